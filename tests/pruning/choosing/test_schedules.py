"""The widths that stages of shuffles go through, and which channels go."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from taylor_kernels.pruning.choosing.schedules import Schedule
from taylor_kernels.pruning.choosing.selection import select
from taylor_kernels.tracing import IN
from tests.pruning.shuffled_stages import Added, Block, First, Run, drawn_network, staged

SEEDS = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@given(
    rows=st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), min_size=1, max_size=7),
    allowed=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_a_schedule_goes_to_the_least_width_through_as_many_as_can_be(rows, allowed):
    counts = np.array([[-1, -1, -1], *rows, [4, 4, 4]])
    counts = np.column_stack([counts, np.where(counts[:, 0] < 0, -1, np.arange(len(counts)))])
    may = np.array([*allowed, *[True] * 8])[: len(counts)]

    def ways(row: int) -> list[list[int]]:
        """All of them, from a width on."""
        found = [[row]]
        for other in range(1, row):
            if may[other] and counts[other].min() >= 0 and (counts[other] <= counts[row]).all():
                found += [[row, *way] for way in ways(other)]
        return found

    found = ways(len(counts) - 1)
    least = min(way[-1] for way in found)
    schedule = Schedule(counts, may)
    steps = schedule.steps()
    assert schedule.least.tolist() == counts[least].tolist()
    assert len(steps) == max(len(way) for way in found if way[-1] == least)
    assert (np.diff(steps, axis=0) <= 0).all()
    assert steps[-1].tolist() == schedule.least.tolist()
    for step in range(len(steps)):
        assert schedule.steps(steps[step].tolist(), range(4))[-1].tolist() == steps[-1].tolist()


@SEEDS
@given(seed=st.integers(0, 2**20), most=st.floats(0.05, 0.6))
def test_the_cheapest_bundles_go_and_of_each_kind_the_cheapest(seed, most):
    with torch.random.fork_rng():
        network = Run(drawn_network(seed), params=0.5).pruner._network
        groups, scores = network.groups, [torch.rand(g.size) for g in network.groups]
    wanted = int(most * network.meter.cost.filters)
    budget = SimpleNamespace(filters=wanted, met=lambda meter: False)
    taken = select(groups, network.dead, scores, network.meter, budget)
    ranked = [score.double().sort().values for score in scores]
    for score, units, order in zip(scores, taken, ranked, strict=True):
        torch.testing.assert_close(score[units].double().sort().values, order[: units.numel()])
    last, behind, total = [], [], 0
    stages = {group.schedule: [] for group in groups}
    for number, group in enumerate(groups):
        stages[group.schedule].append(number)
    for schedule, numbers in stages.items():
        teams = [numbers] if schedule is not None else [[number] for number in numbers]
        for team in teams:
            gone = [taken[number].numel() for number in team]
            total += sum(
                n * groups[number].filters_per_unit for n, number in zip(gone, team, strict=True)
            )
            if schedule is None:
                steps = np.arange(groups[team[0]].most_removable(groups[team[0]].size) + 1)[:, None]
            else:
                left = schedule.steps()[:, [groups[number].kind for number in team]]
                steps = left[0] - left
            place = steps.tolist().index(gone)
            worth = -1.0
            for at, (one, other) in enumerate(pairwise(steps.tolist())):
                going = [ranked[n][a:b] for n, a, b in zip(team, one, other, strict=True)]
                worth = max(worth, torch.cat(going).mean().item())
                if at == place - 1:
                    last.append(worth)
                if at == place:
                    behind.append(worth)
    assert total >= wanted
    assert max(last) <= min(behind, default=2.0) + 1e-12


@SEEDS
@given(seed=st.integers(0, 2**20), share=st.sampled_from([0.1, 1.0]))
@pytest.mark.filterwarnings("error")
def test_units_that_no_layer_makes_any_more_stay(seed, share):
    """Those of all groups of stages, or of some."""
    with torch.random.fork_rng():
        network = Run(drawn_network(seed), params=0.5).pruner._network
        left = [g.schedule is None or torch.rand(()).item() > share for g in network.groups]
        scores = [torch.rand(g.size) for g in network.groups]
    groups = [
        group if stays else replace(group, slots=tuple(s for s in group.slots if s.side == IN))
        for group, stays in zip(network.groups, left, strict=True)
    ]
    scores = [s if stays else s + torch.inf for s, stays in zip(scores, left, strict=True)]
    budget = SimpleNamespace(filters=network.meter.cost.filters, met=lambda meter: False)
    taken = select(groups, network.dead, scores, network.meter, budget)
    assert all(stays or not units.numel() for units, stays in zip(taken, left, strict=True))
    for group, units in zip(groups, taken, strict=True):
        if group.schedule is None:
            assert units.numel() == group.most_removable(group.size)


@pytest.mark.parametrize(("half", "least"), [(7, 4), (10, 4), (13, 3), (16, 5)])
def test_every_layer_gets_as_narrow_as_min_filters_says(half, least):
    """Though more widths lie on a way that ends above it."""
    model = nn.Sequential(
        First(3, half, 2), *(Block(half, 2) for _ in range(3)), nn.Conv2d(2 * half, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    network = Run(model, filters=0.9, min_filters=least).pruner._network
    groups = network.groups
    left = sum((g.size - g.most_removable(g.size)) * g.filters_per_unit for g in groups)
    whole = network.meter.cost.filters
    ends = {
        owner: sum(
            (g.size - g.most_removable(g.size)) * slot.index.size(1)
            for g in groups
            for slot in g.producers
            if slot.owner == owner
        )
        for owner in ("0.one.0", "1.body.4", "3.body.4")
    }
    assert set(ends.values()) == {least}
    pruner = Run(copy.deepcopy(model), filters=left / whole, min_filters=least).pruner
    assert staged(pruner)


@pytest.mark.parametrize(("round_to", "min_filters"), [(2, 3), (4, 2), (8, 1)])
def test_widths_are_multiples(round_to, min_filters):
    torch.manual_seed(round_to)
    model = nn.Sequential(
        First(3, 24, 1), *(Block(24, 1) for _ in range(4)), Added(48), nn.Conv2d(48, 2, 1)
    ).double()
    run = Run(model, params=0.6, round_to=round_to, min_filters=min_filters)
    assert staged(run.pruner)
    whole = run.pruner.widths
    while not run.pruner.done:
        run.step(torch.randn(3, 3, 4, 4, dtype=torch.float64))
        widths = run.pruner.widths
        assert all(width % round_to == 0 and width >= min_filters for width in widths.values())
    assert widths["0.one.0"] < whole["0.one.0"]
