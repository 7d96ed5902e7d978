"""Choosing what goes at a pruning: 100 000 units in 5, 100 and 200 groups, against the plain loop.

The floor sorts all scores, which a selection has to do at least in part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bench.harness import Provider
from taylor_kernels.pruning.choosing.budget import Budget
from taylor_kernels.pruning.choosing.selection import select
from tests.helpers.selections import chain, plain_select

#: Name -> the units of each group, and the multiple that widths are kept at.
NETWORKS = {
    "5 groups": ([1000, 3000, 6000, 20_000, 70_000], 1),
    "5 groups, multiples of 8": ([1000, 3000, 6000, 20_000, 70_000], 8),
    "100 groups": ([1000] * 100, 1),
    "200 groups": ([500] * 200, 1),
    "200 groups, multiples of 8": ([500] * 200, 8),
}
PROVIDERS = ("ours", "plain loop", "sort")


def providers(sizes: Sequence[int], multiple: int) -> list[Provider]:
    # A narrow layer between two groups: all pairs of wide ones would not fit into memory.
    widths = [width for size in sizes for width in (size, 1)]
    groups, meter = chain(widths, [(1, multiple if n > 1 else 1, 1) for n in widths])
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator, dtype=torch.float64) for n in widths]
    dead = [torch.zeros(n, dtype=torch.bool) for n in widths]
    budget = Budget(meter, groups, {"filters": 0.5}, 0.02)

    def by(choose: Callable[..., list[Tensor]]) -> list[Tensor]:
        taken = choose(groups, dead, scores, meter, budget)
        for group, units in zip(groups, taken, strict=True):
            meter.take(group, -len(units))
        return taken

    expected = by(plain_select)

    def check(taken: list[Tensor]) -> float:
        assert all(map(torch.equal, taken, expected))
        return 0.0

    return [
        Provider("ours", lambda: by(select), check, "ours"),
        Provider("plain loop", lambda: by(plain_select), check, rounds=3),
        Provider("sort", lambda: torch.cat(scores).sort(stable=True), role="floor"),
    ]


@pytest.mark.quick(network=["5 groups"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("on", ["cpu"])
@pytest.mark.parametrize("network", NETWORKS)
def bench_selection(network, on, provider, measured, record, rounds) -> None:
    case = ("selection", network)
    results = measured.get(case, lambda: providers(*NETWORKS[network]), rounds(25), keep_busy=False)
    record(case, results, provider)
