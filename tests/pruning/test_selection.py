"""The selection at once is that of the plain loop over bundles of units, to the last unit."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taylor_kernels.pruning.budget import Budget
from taylor_kernels.pruning.flops import Meter
from taylor_kernels.pruning.groups import Group
from taylor_kernels.pruning.selection import select
from taylor_kernels.tracing import IN, OUT, Entry, Slot


def chain(sizes, makes):
    """An MLP and its meter; of its hidden layers these are a group each.

    Args:
        sizes: units of each hidden layer.
        makes: of each, (channels of a unit, multiple, minimum).
    """
    widths = [3, *(n * m for n, (m, _, _) in zip(sizes, makes, strict=True)), 2]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    groups = []
    for number, (n, (channels, multiple, minimum)) in enumerate(zip(sizes, makes, strict=True)):
        index = torch.randperm(n * channels).view(n, channels).sort(1).values
        slots = Slot(str(number), OUT, index), Slot(str(number + 1), IN, index)
        entries = (
            Entry(f"{number}.weight", 0, index),
            Entry(f"{number}.bias", 0, index),
            Entry(f"{number + 1}.weight", 1, index),
        )
        groups.append(Group(slots, entries, torch.arange(n), (), multiple, minimum))
    macs = {name: weight.numel() for name, weight in weights.items()}
    return groups, Meter(model, macs, 2 * sum(macs.values()), groups)


def plain_select(groups, dead, scores, meter, budget):
    """The algorithm as one would write it down: a bundle after the other."""
    bundles = []
    for number, (group, gone, score) in enumerate(zip(groups, dead, scores, strict=True)):
        alive = (~gone).nonzero().flatten()
        order = alive[torch.sort(score[alive].double(), stable=True).indices]
        worth = score[order].double()
        done, dearest = 0, -float("inf")
        while done * group.filters_per_unit < budget.filters:
            count = group.next_to_go(alive.numel() - done)
            if not count:
                break
            chunk = slice(done, done + count)
            dearest = max(dearest, worth[chunk].mean().item())
            bundles.append((dearest, number, done, order[chunk]))
            done += count
    bundles.sort(key=lambda bundle: bundle[:3])
    taken = [[] for _ in groups]
    count = 0
    for _, number, _, units in bundles:
        if count >= budget.filters or budget.met(meter):
            break
        meter.take(groups[number], units.numel())
        taken[number].append(units)
        count += units.numel() * groups[number].filters_per_unit
    nothing = torch.empty(0, dtype=torch.int64)
    return [torch.cat(parts).sort().values if parts else nothing for parts in taken]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    makes=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12)), min_size=5, max_size=5
    ),
    levels=st.sampled_from([1, 3, 50, 2**40]),
    kinds=st.sets(st.sampled_from(["flops", "params", "filters"]), min_size=1),
    fraction=st.floats(0.0, 1.0),
    per_step=st.one_of(st.integers(1, 40), st.floats(0.01, 0.9)),
    seed=st.integers(0, 2**20),
)
def test_it_is_the_plain_loop(sizes, makes, levels, kinds, fraction, per_step, seed):
    torch.manual_seed(seed)
    makes = makes[: len(sizes)]
    groups, meter = chain(sizes, makes)
    other = chain(sizes, makes)[1]
    for group in groups:
        meter.take(group, group.most_removable(group.size))
    whole = other.cost
    reachable = meter.cost.over(whole)
    for group in groups:
        meter.take(group, -group.most_removable(group.size))
    targets = {k: max(reachable[k], 1 - fraction * (1 - reachable[k])) for k in kinds}
    budget = Budget(meter, groups, targets, per_step)

    dead = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
    for _ in range(6):  # until all is met, and once more
        # Few levels make ties; scores of other signs and sizes make rounding.
        scores = [
            torch.randint(levels, (group.size,)).double() / 7 - levels / 21 for group in groups
        ]
        expected = plain_select(groups, dead, scores, other, budget)
        found = select(groups, dead, scores, meter, budget)
        assert [units.tolist() for units in found] == [units.tolist() for units in expected]
        assert (meter.cost, meter.shapes) == (other.cost, other.shapes)
        for gone, units in zip(dead, found, strict=True):
            gone[units] = True


def test_bundles_of_equal_scores_go_from_the_first():
    """The mean of seven equal numbers may be less than the number."""
    draws = torch.rand(1000, dtype=torch.float64)
    equal = next(row for row in draws[:, None].repeat(1, 15) if row[:7].mean() < row[0])
    groups, meter = chain([15], [(1, 7, 1)])
    budget = Budget(meter, groups, {"filters": 14 / 15}, 1)
    (units,) = select(groups, [torch.zeros(15, dtype=torch.bool)], [equal], meter, budget)
    assert units.tolist() == [0]


def test_a_hundred_thousand_units_take_no_time_each(one_thread):
    """A loop over units takes seconds here; the bound leaves room for a busy machine."""
    torch.manual_seed(0)
    sizes = [1000, 1, 3000, 1, 6000, 1, 20_000, 1, 70_000]  # narrow in between, for memory's sake
    for multiple in (1, 8):
        groups, meter = chain(sizes, [(1, multiple, 1)] * len(sizes))
        budget = Budget(meter, groups, {"filters": 0.9}, 0.2)
        dead = [torch.zeros(size, dtype=torch.bool) for size in sizes]
        scores = [torch.rand(size) for size in sizes]
        start = time.perf_counter()
        found = select(groups, dead, scores, meter, budget)
        assert time.perf_counter() - start < 0.3
        assert sum(map(len, found)) >= 0.1 * sum(sizes)
