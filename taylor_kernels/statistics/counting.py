"""Which examples count, where some are padding: masks of an update, given pass by pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from taylor_kernels.checks import is_iterable
from taylor_kernels.statistics.base import Statistic

#: [N] or [N, T], 0 where an example, or a token, is padding; one for each forward pass.
Mask = Tensor | Sequence[Tensor]


def counted(statistic: Statistic, mask: Mask | None) -> AbstractContextManager[None]:
    """Where a statistic collects what counts by a mask, alone.

    Raises:
        ValueError, TypeError: the mask is none, leaves nothing over, or has no place where a
            statistic runs the model itself.
    """
    return nullcontext() if mask is None else _counted(statistic, _checked(statistic, mask))


@contextmanager
def _counted(statistic: Statistic, masks: list[Tensor]) -> Iterator[None]:
    statistic.mask = masks
    try:
        yield
    finally:
        statistic.mask = None


def _checked(statistic: Statistic, mask: Mask) -> list[Tensor]:
    if not isinstance(mask, Tensor) and not is_iterable(mask):
        raise TypeError(f"mask: expected tensors, one for each pass, got {type(mask).__name__}")
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    if statistic.reads == "closure":
        raise ValueError(
            f"mask: statistic {statistic.name!r} runs the model itself and counts what the loss "
            "counts; leave it out"
        )
    for one in masks:
        if not isinstance(one, Tensor):
            raise TypeError(f"mask: expected tensors, one for each pass, got {type(one).__name__}")
        if one.is_floating_point() or one.is_complex() or one.dim() not in (1, 2):
            raise ValueError(
                "mask: expected bool or integers of shape [N] or [N, T], 0 where there is padding, "
                f"got {one.dtype} of shape {tuple(one.shape)}"
            )
    masks = [one != 0 for one in masks]
    if not any(bool(one.any()) for one in masks):
        raise ValueError("mask: no example counts; call skip() for such a minibatch")
    return masks


class Counting:
    """The masks of the passes of an update.

    Args:
        masks: one for each pass.
        passes: their numbers, in any order, as often as may be.

    Raises:
        ValueError: there are not as many masks as passes.
    """

    def __init__(self, masks: Sequence[Tensor], passes: Iterable[int]) -> None:
        numbers = sorted(set(passes))
        if len(numbers) != len(masks):
            raise ValueError(
                f"mask: {len(masks)} given, and the model ran {len(numbers)} times since the last "
                "update; give a list with one for each forward pass, in their order"
            )
        self._masks = dict(zip(numbers, masks, strict=True))

    def of(self, name: str, number: int, examples: int) -> Tensor:
        """[examples] bool: which count, of what a layer was given in a pass.

        Where dim 0 of the layer is that of the mask, an example counts if any of its tokens does;
        where tokens of all examples were put into dim 0, each is an example of its own.
        """
        mask = self._masks[number]
        if examples == len(mask):
            return mask if mask.dim() == 1 else mask.any(1)
        if examples == mask.numel():
            return mask.flatten()
        raise ValueError(
            f"mask: has shape {tuple(mask.shape)}, and {name} was given {examples} examples "
            f"(dim 0); give one of shape [{examples}], or [N, T] with as many tokens"
        )

    def count(self, name: str, number: int, examples: int) -> int:
        """How many of these examples count."""
        return int(torch.count_nonzero(self.of(name, number, examples)))


def counting(statistic: Statistic, passes: Iterable[int]) -> Counting | None:
    """The masks of the update that is being collected; None where all examples count."""
    return None if statistic.mask is None else Counting(statistic.mask, passes)
