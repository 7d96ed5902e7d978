"""Proof on a copy that masking a group equals removing it.

Tracing guesses at reshapes, shuffles and bare parameters, and cannot know what an operation does
across channels (softmax, RMS norms, a width written into a forward method). So every group is
tried: about half its units are masked, the outputs kept, the same units removed, and the outputs
compared in float64. A group that differs, or breaks the model, is not pruned.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.pruning.masking import write
from taylor_kernels.pruning.model_run import call, preserved_rng, tensors_in
from taylor_kernels.pruning.removal import remove
from taylor_kernels.pruning.units import Group, removed_entries

#: Relative to the greatest output, in float64 and in lower precision. Rounding stays far below;
#: half of a group's channels missing from a norm or a softmax is far above.
_EXACT, _LOOSE = 1e-7, 2e-2


def unsound(
    model: nn.Module, example_inputs: Any, groups: Sequence[Group], *, train_too: bool
) -> dict[int, str]:
    """The numbers of the groups whose removal is not what masking them is, with the reason.

    Args:
        model: in eval mode; left as it is.
        train_too: it has layers that eval mode does not reach (heads for training alone), so it
            must also run in train mode without the units.
    """
    trial = _Trial(model, example_inputs, train_too)
    found: dict[int, str] = {}

    def search(numbers: list[int]) -> None:
        reason = trial.run([groups[number] for number in numbers])
        if not reason:
            return
        if len(numbers) == 1:
            found[numbers[0]] = reason
            return
        half, before = len(numbers) // 2, len(found)
        search(numbers[:half])
        search(numbers[half:])
        if len(found) == before:  # each half is sound and both together are not
            found.update(dict.fromkeys(numbers, reason))

    search(list(range(len(groups))))
    return found


class _Trial:
    def __init__(self, model: nn.Module, example_inputs: Any, train_too: bool) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._given = model, example_inputs
        self._train_too = train_too
        self._use(torch.float64)
        if train_too:
            # One example is too few for BatchNorm to train on: then there is nothing to compare.
            with contextlib.suppress(Exception):
                self._train_too = False
                self._outputs(copy.deepcopy(self._model).train())
                self._train_too = True

    def _use(self, dtype: torch.dtype | None) -> None:
        self._exact = dtype is not None
        self._model, self._inputs = self._prepared(*self._given, dtype)

    def _prepared(
        self, model: nn.Module, example_inputs: Any, dtype: torch.dtype | None
    ) -> tuple[nn.Module, Any]:
        """A copy with noise on every value: zeros and ones (a fresh norm, a last layer that
        starts at zero, an empty example) would hide what a channel does."""
        model = copy.deepcopy(model).to(dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
                parameter.add_(self._noise(parameter), alpha=max(fan_in, 1) ** -0.5)

        def noisy(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach().to(dtype or value.dtype)
                return value + self._noise(value)
            return value

        return model, tree_map(noisy, example_inputs)

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.rand(like.shape, generator=self._generator) - 0.5
        return noise.to(like.device, like.dtype)

    def run(self, groups: Sequence[Group]) -> str:
        """What is wrong with removing units of these groups; "" if nothing."""
        draw = random.Random(0)
        dead = []
        for group in groups:
            gone = torch.zeros(group.size, dtype=torch.bool)
            count, alive = 0, group.size
            while (more := group.next_to_go(alive)) and (
                not count or count + more <= group.size // 2
            ):
                count, alive = count + more, alive - more
            gone[draw.sample(range(group.size), count)] = True
            dead.append(gone)
        model = copy.deepcopy(self._model)
        write(model, removed_entries(groups, dead))
        try:
            masked = self._outputs(model)
        except (RuntimeError, TypeError):
            if not self._exact:
                raise
            # A model that casts inside forward() cannot run in float64.
            self._use(None)
            return self.run(groups)
        try:
            remove(model, groups, dead)
            removed = self._outputs(model)
            if self._train_too:
                self._outputs(model.train())
        except Exception as error:
            return f"the model does not run without some of its channels ({_short(error)})"
        tolerance = _EXACT if self._exact else _LOOSE
        for one, other in zip(masked, removed, strict=True):
            if one.shape != other.shape:
                return "removing its channels changes the shape of the output"
            scale = one.abs().nan_to_num().max() if one.numel() else 0.0
            if not torch.allclose(
                one, other, rtol=0.0, atol=float(scale) * tolerance, equal_nan=True
            ):
                return "an operation mixes its channels: a masked one is not a removed one"
        return ""

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        # Every run starts from the caller's random state and gives it back.
        with torch.no_grad(), preserved_rng():
            outputs = tensors_in(call(model, self._inputs))
            return [out for out in outputs if out.is_floating_point()]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
