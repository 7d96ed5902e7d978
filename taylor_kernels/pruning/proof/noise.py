"""Noise that a proof adds to what a model computes with, so that no two numbers are alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Kind = Literal["any", "away", "none"]
_KINDS: tuple[Kind, ...] = ("any", "away", "none")


class Noise:
    """Random numbers in [-0.5, 0.5) to add to tensors: as many as a prime says, again and again.

    To draw them takes longer than a small model runs. The rows of a tensor get different ones, as
    no width that tensors have is a multiple of the prime.

    Attributes:
        kind: "any"; "away" from zero, so that roots and logarithms of what they are added to stay
            what they are; or "none".
    """

    _PERIOD = 65537

    def __init__(self) -> None:
        self.kind: Kind = "any"
        self._generator = torch.Generator().manual_seed(0)
        self._drawn = torch.from_numpy(_drawn(self._PERIOD))

    def places(self, count: int) -> list[int]:
        """Random places to begin at."""
        return torch.randint(self._PERIOD, (count,), generator=self._generator).tolist()

    def add_to(self, tensor: Tensor, begin: int, scale: float = 1.0) -> Tensor:
        """Add them in place to a dense tensor of floating-point numbers, from a place on; others
        stay as they are."""
        if not tensor.is_floating_point() or tensor.layout != torch.strided or self.kind == "none":
            return tensor
        noise = self._drawn[begin : begin + min(tensor.numel(), self._PERIOD)].to(tensor)
        whole = tensor.as_strided((tensor.numel(),), (1,))
        for part in whole.split(self._PERIOD) if len(whole) > self._PERIOD else (whole,):
            own = noise[: len(part)]
            if self.kind == "away":
                own = torch.where(part < 0, -own.abs(), own.abs())
            part.add_(own, alpha=scale)
        return tensor

    def on_inputs(self, example_inputs: Any) -> Any:
        """A copy of them with noise."""

        def add(value: Any) -> Any:
            return (
                self.add_to(value.detach().clone(), *self.places(1))
                if isinstance(value, Tensor)
                else value
            )

        return tree_map(add, example_inputs)


@cache
def _drawn(period: int) -> npt.NDArray[np.float64]:
    """The numbers, twice: the same for all proofs of a process.

    They are NumPy's, as a tensor would stay one of the mode that the first proof was made in.
    """
    return np.tile(np.random.default_rng(0).random(period) - 0.5, 2)


def choose_noise(noise: Noise, broken: Callable[[], dict[str, bool]]) -> None:
    """Let the noise be of a kind that the code of a model bears: none that turns what it takes a
    root or a logarithm of into nan.

    Args:
        broken: runs the model with noise of the kind that is set, and gives the layers that have
            put out nan or infinity -> whether there was anything else.

    Raises:
        ValueError: without any noise some layer puts out no finite number.
    """
    found: dict[str, bool] = {}
    for noise.kind in _KINDS:
        if not (found := broken()):
            return
    if hollow := [name for name, more in found.items() if not more]:
        raise ValueError(
            f"example_inputs: {hollow[0]!r} puts out nothing but nan or infinity for them, which "
            "would hide any fault in what is to be pruned; pass others, or verify=False to go "
            "without the proof"
        )
