"""The selection at once is that of the plain loop over bundles of units, to the last unit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylor_kernels.pruning.choosing.budget import Budget
from taylor_kernels.pruning.choosing.selection import select
from tests.helpers.selections import chain, plain_select


@settings(max_examples=80)
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
    check(sizes, makes, levels, kinds, fraction, per_step, seed)


@given(
    sizes=st.lists(st.integers(20, 60), min_size=2, max_size=5),
    makes=st.lists(
        st.tuples(st.just(1), st.sampled_from([1, 1, 1, 3]), st.integers(1, 30)),
        min_size=5,
        max_size=5,
    ),
    levels=st.sampled_from([3, 50, 2**40]),
    per_step=st.integers(1, 3),
    apart=st.sampled_from([0, 2**40]),
    seed=st.integers(0, 2**20),
)
def test_it_is_the_plain_loop_where_few_of_many_units_go(
    sizes, makes, levels, per_step, apart, seed
):
    """Also where units that have to stay are the cheapest."""
    check(sizes, makes, levels, {"filters"}, 0.9, per_step, seed, apart)


def check(sizes, makes, levels, kinds, fraction, per_step, seed, apart=0):
    """Prunings one after the other are those of the plain loop; the scores of one group lie `apart`
    from those of the next."""
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
            torch.randint(levels, (group.size,)).double() / 7 - levels / 21 + apart * number
            for number, group in enumerate(groups)
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


def lines_of_python(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and how many lines of Python ran for it, repetitions counted."""
    lines = 0

    def count(frame: FrameType, event: str, given: object) -> Callable:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return call(), lines
    finally:
        sys.settrace(before)


def test_a_hundred_thousand_units_take_no_loop():
    sizes = [1000, 1, 3000, 1, 6000, 1, 20_000, 1, 70_000]  # narrow in between, for memory's sake
    for multiple in (1, 8):
        groups, meter = chain(sizes, [(1, multiple, 1)] * len(sizes))
        budget = Budget(meter, groups, {"filters": 0.9}, 0.2)
        dead = [torch.zeros(size, dtype=torch.bool) for size in sizes]
        scores = [torch.rand(size) for size in sizes]
        call = partial(select, groups, dead, scores, meter, budget)
        found, lines = lines_of_python(call)
        assert lines < sum(sizes) / 8  # a loop over bundles of eight takes one at least of each
        assert sum(map(len, found)) >= 0.1 * sum(sizes)
