"""Proof on a copy that masking a group equals removing it.

What a trace says holds for what ran; code may depend on widths in ways that no run shows (a width
written into a forward method, an attribute that counts channels under a name of its own). So every
group is tried: some of its units are masked, the outputs kept, the same units removed, and the
outputs compared in float64. A group that differs, or breaks the model, is not pruned.

Which units go differs from draw to draw: the first ones, the last ones, every other one, any. Code
that splits channels at half of their number would pass with a balanced choice. All groups are tried
at once; only where that fails are they halved, until the ones to blame are left.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.pruning.exact_run import InDouble, SteadyNoise, widened
from taylor_kernels.pruning.groups import Group
from taylor_kernels.pruning.masking import fill, fills
from taylor_kernels.pruning.removal import assign, lookup, remove
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.running import Untouched, call, copied, quiet, tensors_in

#: Relative to the greatest output, in float64 and in lower precision. Rounding stays far below;
#: half of a group's channels missing from a norm or a softmax is far above.
_EXACT, _LOOSE = 1e-7, 2e-2
#: One for each way to choose units.
_DRAWS = 4
#: After so much time no further draw is made, and groups that have passed none are left out.
SECONDS = 120.0


def unsound(
    model: nn.Module, example_inputs: Any, channels: Channels, *, train_too: bool
) -> dict[int, str]:
    """The numbers of the groups whose removal is not what masking them is, with the reason.

    Args:
        model: in eval mode; left as it is.
        train_too: it has layers that eval mode does not reach (heads for training alone), so it
            must also run in train mode without the units.
    """
    trial = _Trial(model, example_inputs, channels, train_too)
    until = time.monotonic() + SECONDS
    found: dict[int, str] = {}
    for draw in range(_DRAWS):
        while numbers := [n for n in range(len(channels.groups)) if n not in found]:
            if time.monotonic() > until and draw:
                return found
            culprits = _culprits(trial, numbers, draw, until)
            found |= culprits
            if not culprits:
                break
    return found


def _culprits(trial: _Trial, numbers: list[int], draw: int, until: float) -> dict[int, str]:
    if time.monotonic() > until:
        reason = (
            f"was not proven within {SECONDS:g} seconds; pass smaller example inputs, or "
            "verify=False to go without the proof"
        )
        return dict.fromkeys(numbers, reason)
    reason = trial.fault(numbers, draw)
    if not reason or len(numbers) == 1:
        return dict.fromkeys(numbers, reason) if reason else {}
    half = len(numbers) // 2
    found = _culprits(trial, numbers[:half], draw, until)
    found |= _culprits(trial, numbers[half:], draw, until)
    # Each half may be sound, and both together not.
    return found or dict.fromkeys(numbers, reason)


class _Trial:
    """A copy of the model whose tensors are exchanged for each run and put back after it."""

    def __init__(
        self, model: nn.Module, example_inputs: Any, channels: Channels, train_too: bool
    ) -> None:
        self._given = model, example_inputs
        self._channels = channels
        self._steady = False
        self._train_too = False
        self._use(exact=True)
        if train_too:
            # One example is too few for BatchNorm to train on: then there is nothing to compare.
            with suppress(Exception), self._restored():
                self._outputs(train=True)
                self._train_too = True

    def _use(self, *, exact: bool) -> None:
        """A copy with noise on every value: zeros and ones (a fresh norm, a last layer that starts
        at zero, an empty example) would hide what a channel does."""
        self._exact = exact
        model, example_inputs = self._given
        self._model = model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(0)

        def noisy(value: Any, scale: float = 1.0) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            noise = torch.rand(value.shape, generator=generator) - 0.5
            return value.detach() + scale * noise.to(value)

        if exact:
            model._apply(widened)
            for module in model.modules():
                own = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
                for name, tensor in own.items():
                    setattr(module, name, widened(tensor.detach()))
            example_inputs = tree_map(
                lambda value: widened(value) if isinstance(value, Tensor) else value,
                example_inputs,
            )
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.data = noisy(parameter.data, max(fan_in, 1) ** -0.5)
        self._inputs = tree_map(noisy, example_inputs)
        self._buffers = dict(model.named_buffers())
        self._tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **self._buffers}

    def fault(self, numbers: Collection[int], draw: int) -> str:
        """What is wrong with removing units of these groups; "" if nothing."""
        channels = self._channels
        dead = [
            _units(cast(Group, group), number, draw)
            if number in numbers
            else torch.zeros(group.size, dtype=torch.bool)
            for number, group in enumerate(channels.groups)
        ]
        entries = channels.entries(dead)
        try:
            with self._restored(entries):
                for name, parts in fills(self._model, channels, entries).items():
                    fill(lookup(self._model, name).data, parts)
                masked = self._outputs()
        except (RuntimeError, TypeError):
            if not self._exact:
                raise
            # Code that neither knows float64 nor lets itself be told of it.
            self._use(exact=False)
            return self.fault(numbers, draw)
        try:
            with self._restored():
                remove(self._model, channels, dead)
                removed = self._outputs()
                if self._train_too:
                    self._outputs(train=True)
        except Exception as error:
            return f"the model does not run without some of its channels ({_short(error)})"
        return _difference(masked, removed)

    @contextmanager
    def _restored(self, touched: Collection[str] = ()) -> Iterator[None]:
        """Inside, `touched` tensors may be written into, and any be replaced."""
        untouched = Untouched(list(self._model.modules()), list(self._tensors.values()))
        names = {*touched, *self._buffers}
        assign(self._model, {name: _clone(self._tensors[name]) for name in names})
        try:
            yield
        finally:
            assign(self._model, self._tensors)
            untouched.restore()

    def _outputs(self, *, train: bool = False) -> list[Tensor]:
        self._model.train(train)
        with ExitStack() as stack:
            stack.enter_context(quiet())  # every run starts from the caller's random state
            if self._exact:
                stack.enter_context(InDouble())
            before = _random_state()
            if self._steady:
                stack.enter_context(SteadyNoise())
            outputs = list(tensors_in(call(self._model, copied(self._inputs))))
            if self._steady or _same(before, _random_state()):
                return outputs
        self._steady = True
        return self._outputs(train=train)


def _units(group: Group, number: int, draw: int) -> Tensor:
    """About half of a group's units, an odd number where it may be: [U] bool."""
    allowed, alive = [0], group.size
    while (more := group.next_to_go(alive)) and allowed[-1] + more <= max(group.size // 2, more):
        alive -= more
        allowed.append(allowed[-1] + more)
    odd = [count for count in allowed if count % 2]
    count = (odd or allowed)[-1]
    gone = torch.zeros(group.size, dtype=torch.bool)
    way = (number + draw) % _DRAWS
    if way == 0:
        gone[:count] = True
    elif way == 1:
        gone[group.size - count :] = True
    elif way == 2:
        gone[torch.arange(group.size).view(-1)[1::2][:count]] = True
    else:
        gone[random.Random(number + draw).sample(range(group.size), count)] = True
    return gone


def _difference(masked: Sequence[Tensor], removed: Sequence[Tensor]) -> str:
    if [one.shape for one in masked] != [other.shape for other in removed]:
        return "removing its channels changes the shape of the output"
    for one, other in zip(masked, removed, strict=True):
        if not _close(*(part.to_dense() if part.is_sparse else part for part in (one, other))):
            return "an operation mixes its channels: a masked one is not a removed one"
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    exact = one.dtype in (torch.float64, torch.complex128)
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    atol = scale * (_EXACT if exact else _LOOSE)
    return torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True)


def _clone(tensor: Tensor) -> Tensor:
    new = tensor.detach().clone()
    return nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new


def _random_state() -> list[Tensor]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
