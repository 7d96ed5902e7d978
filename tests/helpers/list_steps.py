"""Lists of tensors for the ops that rank a whole network and step it: shapes, dtypes, ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taylor_kernels.backends import reference
from taylor_kernels.layout import GlobalThresholdArgs, MomentumItem, SparseMomentumArgs
from taylor_kernels.ops.global_threshold import threshold_items

#: They end within a chunk of csrc/cuda/list_launch.cuh, with it and behind it; one is not ranked.
SIZES = (5, 33_001, 1, 16_384, 252)
RANKED = (True, True, False, True, True)
COUNTS = (1, 900, sum(n for n, ranked in zip(SIZES, RANKED, strict=True) if ranked) - 1)
Run = Callable[[str, object], None]


def lists(dtypes: Sequence[torch.dtype], ties: bool) -> list[list[Tensor]]:
    """Weights, gradients and momenta, whose dtypes take turns; every other starts off a vector."""

    def drawn(i: int, size: int) -> Tensor:
        values = torch.randn(size + 1)[i % 2 :][:size]
        return (values.round() if ties else values).to(dtypes[i % len(dtypes)])

    return [[drawn(i, n) for i, n in enumerate(SIZES)] for _ in range(3)]


def threshold(
    run: Run, tensors: list[Tensor], factors: list[Tensor] | None, count: int, signed: bool
) -> Tensor:
    table = torch.full((3,), -7)
    run(
        "global_threshold",
        GlobalThresholdArgs(table, threshold_items(tensors, factors, RANKED), count, signed),
    )
    return table


def stepped(
    run: Run,
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    table: Tensor,
    rows: bool,
) -> list[Tensor]:
    """Copies of weights and momenta after a step; with `rows`, of rows of five elements."""
    w, z = ([t.clone() for t in each] for each in (weights, momenta))
    items, first = [], 0
    for i, (a, b, c) in enumerate(zip(w, grads, z, strict=True)):
        count = -(-a.numel() // 5)
        scores = a.abs().float()[:count].contiguous() if rows and RANKED[i] else None
        numbers = (0.1 + 0.01 * i, 0.01, 0.9)
        items.append(
            MomentumItem(a, b, c, scores, a.numel(), 5, first, a.dtype, RANKED[i], *numbers)
        )
        first += (a.numel() if scores is None else count) if RANKED[i] else 0
    run("sparse_momentum", SparseMomentumArgs(table, items))
    return w + z


def by_reference(op: str, call: object) -> None:
    if op == "sparse_momentum" and any(item.row_scores is not None for item in call.items):
        # The reference repeats a row's decision; the last row here may be shorter.
        for item in call.items:
            _whole_rows(item, call.table)
        return
    getattr(reference, op)(call)


def _whole_rows(item: MomentumItem, table: Tensor) -> None:
    pad = -item.elements % item.row_elements
    padded = [torch.cat((t, t.new_zeros(pad))) for t in (item.weight, item.grad, item.momentum)]
    whole = item._replace(weight=padded[0], grad=padded[1], momentum=padded[2])
    reference.sparse_momentum(SparseMomentumArgs(table, [whole]))
    item.weight.copy_(padded[0][: item.elements])
    item.momentum.copy_(padded[2][: item.elements])
