"""global_threshold: which elements of many tensors are the `count` greatest of all, exactly.

No sort and no copy of all scores: the key of the last is found digit by digit, from counts of how
many scores have which digit, or on a CPU among the few that a sample says to keep. Equal scores go
by their position, so that exactly `count` are chosen. It is what GSM ranks the weights of a network
with in every step (Ding et al., NeurIPS 2019), and a global pruning threshold of any other score.
Kernels: csrc/common/global_threshold.h, backends/triton/global_threshold.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, kernel
from taylor_kernels.backends.reference import among_the_greatest, narrowed
from taylor_kernels.layout import (
    GlobalThresholdArgs,
    ScoreItem,
    accumulator,
    in_memory_order,
    in_order_of,
)
from taylor_kernels.ops._in_place import check_lists
from taylor_kernels.ops._library import define


def global_threshold(
    tensors: Sequence[Tensor],
    count: int,
    *,
    factors: Sequence[Tensor] | None = None,
    ranked: Sequence[bool] | None = None,
    signed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Which are the `count` greatest scores |a·b|, |a| or a, told by a table of three numbers.

    Args:
        tensors: a (float32, float16, bfloat16 or float64), of any shapes, on one device; any
            strides (contiguous and channels_last are read in place).
        count: how many are chosen, from 1 to the number of elements.
        factors: b, each with its tensor's shape, dtype and device; scores are then |a·b|.
        ranked: of each tensor, whether it takes part. Of others it is only seen that their b, or
            their a without b, are finite.
        signed: scores are a itself.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        [3] int64: key, last and broken, of csrc/common/global_threshold.h; `greatest_masks` reads
        them. Products and scores are float32. The host waits for nothing.

    Raises:
        TypeError, ValueError: what is no such tensor, or does not match; `count` out of range.
        RuntimeError: the named backend cannot run here.
    """
    check_name(backend)
    tensors = list(tensors)
    ranked = [True] * len(tensors) if ranked is None else list(ranked)
    others = None if factors is None else list(factors)
    table: Tensor = _op(tensors, others, ranked, count, signed, backend)
    return table


def greatest_masks(
    tensors: Sequence[Tensor],
    table: Tensor,
    *,
    factors: Sequence[Tensor] | None = None,
    signed: bool = False,
) -> list[Tensor]:
    """bool tensors: which elements a table of `global_threshold` on the same tensors names."""
    masks, first = [], 0
    for i, a in enumerate(tensors):
        a_flat = in_memory_order(a, a).reshape(-1).to(accumulator(a.dtype))
        if factors is not None:
            b = in_memory_order(a, factors[i]).reshape(-1)
            a_flat = b.to(accumulator(b.dtype)) * a_flat
        mask = among_the_greatest(narrowed(a_flat), table, first, signed)
        masks.append(in_order_of(a, mask))
        first += a.numel()
    return masks


def threshold_items(
    tensors: Sequence[Tensor], factors: Sequence[Tensor] | None, ranked: Sequence[bool]
) -> list[ScoreItem]:
    """The tensors as the kernels are told of them, without empty ones."""
    items = []
    for i, (a, is_ranked) in enumerate(zip(tensors, ranked, strict=True)):
        b = None if factors is None else in_memory_order(a, factors[i]).contiguous()
        item = ScoreItem(in_memory_order(a, a).contiguous(), b, a.numel(), a.dtype, is_ranked)
        if item.elements:
            items.append(item)
    return items


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype by which a call's backend is chosen: float64 if there is any."""
    wide = any(t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _run(
    tensors: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    ranked: Sequence[bool],
    count: int,
    signed: bool,
    backend: str | None,
) -> Tensor:
    check_lists(tensors=tensors, **({} if factors is None else {"factors": factors}))
    if len(ranked) != len(tensors):
        raise ValueError(f"ranked: {len(ranked)} values for {len(tensors)} tensors")
    total = sum(t.numel() for t, each in zip(tensors, ranked, strict=True) if each)
    if not 1 <= count <= total:
        raise ValueError(f"count: {count} is not between 1 and the {total} ranked elements")
    run = kernel("global_threshold", tensors[0].device, widest(tensors), backend)
    table = _empty(tensors)
    run(GlobalThresholdArgs(table, threshold_items(tensors, factors, ranked), count, signed))
    return table


def _empty(tensors: Sequence[Tensor], *_: object) -> Tensor:
    return tensors[0].new_empty(3, dtype=torch.int64)


_op = define(
    "global_threshold(Tensor[] tensors, Tensor[]? factors, bool[] ranked, int count, bool signed, "
    "str? backend) -> Tensor",
    _run,
    _empty,
)
