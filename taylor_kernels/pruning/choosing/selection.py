"""Which units go next: one ranking over all groups, under a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.pruning.choosing.budget import Budget
from taylor_kernels.pruning.choosing.flops import Meter
from taylor_kernels.pruning.choosing.groups import Group, by_schedule
from taylor_kernels.tracing import Block


def select(
    groups: Sequence[Group],
    dead: Sequence[Tensor],
    scores: Sequence[Tensor],
    meter: Meter,
    budget: Budget,
) -> list[Tensor]:
    """The units to remove now, cheapest first: `select_with_blocks` where there are no blocks."""
    return select_with_blocks(groups, dead, scores, meter, budget, [], [])[0]


def select_with_blocks(
    groups: Sequence[Group],
    dead: Sequence[Tensor],
    scores: Sequence[Tensor],
    meter: Meter,
    budget: Budget,
    blocks: Sequence[Block],
    worth: Sequence[float],
) -> tuple[list[Tensor], list[int]]:
    """The units and blocks to remove now, cheapest first, until `budget.filters` have gone or it
    is met.

    The units of a group go in bundles that keep its width a multiple; those of a stage in bundles
    of all its groups, each of which brings it to its next width. A bundle is worth the mean score
    of its units, which for bundles of one is a plain sort of all units; the worth of a group's, or
    a stage's, bundles ascends, so that none goes before one that is cheaper. Ties go by the order
    of the groups, stages behind them, then of the units.

    Args:
        dead: per group [U] bool, units gone already.
        scores: per group [U] float, on the CPU; units at infinity do not go.
        meter: counts the units and blocks taken here as gone.
        blocks: those that are left. A block goes as a whole, like a bundle of all its filters; its
            units do not go on their own at the same time.
        worth: of each block, to be ranked with the scores of units.

    Returns:
        Per group [n] int64, ascending, and the numbers of the blocks; all empty if nothing can go.
    """
    bundles = _Bundles(groups, dead, scores, budget.filters)
    owning = len(groups) + len(bundles.stages)
    values = np.concatenate([bundles.worth, np.array(worth, np.float64)])
    sizes = [max(meter.filters_of(block), 1) for block in blocks]
    every = np.concatenate([bundles.filters, np.array(sizes, np.int64)])
    owners = np.concatenate([bundles.owner, owning + np.arange(len(blocks))])
    least = int(every.min()) if every.size else 1
    order = _cheapest(values, min(-(-budget.filters // least), values.size))
    owner, filters = owners[order], every[order].cumsum()
    # One bundle more than stays below the number of filters, and none that has no score.
    most = int(filters.searchsorted(budget.filters)) + 1
    most = min(most, int(np.isfinite(values[order]).sum()))

    taken = [0] * len(groups)  # units that the meter counts as gone
    left: list[int] = []  # blocks that it counts as gone

    def take(number: int) -> None:
        """Let the meter count the cheapest `number` bundles as gone, and no others."""
        counts = np.bincount(owner[:number], minlength=owning + len(blocks))
        wanted = bundles.units_in(counts[:owning]).tolist()
        wanted_blocks = counts[owning:].nonzero()[0].tolist()
        for place in set(left).symmetric_difference(wanted_blocks):
            meter.leave(blocks[place], back=place in left)
        left[:] = wanted_blocks
        for group, before, after in zip(groups, taken, wanted, strict=True):
            if after != before:
                meter.take(group, after - before)
        taken[:] = wanted

    def met(number: int) -> bool:
        take(number)
        return budget.met(meter)

    if met(most):
        # Costs only fall as units go, so the least number of bundles is found by halving.
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if met(middle) else (middle + 1, high)
        take(low)
    going = [blocks[place] for place in left]
    for number, group in enumerate(groups):
        inside = all(any(b.holds(slot.owner) for b in going) for slot in group.producers)
        if taken[number] and inside and group.schedule is None:
            meter.take(group, -taken[number])
            taken[number] = 0
    return bundles.cheapest_units(taken), left


def _stable_order(values: np.ndarray) -> np.ndarray:
    """Where the values are, ascending; equal ones in the order they have, NaN last."""
    order = values.argsort()
    ranked = values[order]
    # Sorting that need not keep the order of equal values takes a fifth of the time, and most
    # scores are all different; NaN is not less than anything and counts as equal here.
    if (ranked[:-1] < ranked[1:]).all():
        return order
    return values.argsort(kind="stable")


def _cheapest(values: np.ndarray, number: int) -> np.ndarray:
    """[number] int64: where the least values are, ascending; equal ones in the order they have."""
    if not 0 < 4 * number < values.size:
        return _stable_order(values)[:number]
    # Few are wanted: those that are as small as the last of them are fewer to sort than all.
    bound = np.partition(values, number - 1)[number - 1]
    found = (~(values > bound)).nonzero()[0]
    return found[_stable_order(values[found])[:number]]


def _could_go(
    groups: Sequence[Group], counts: np.ndarray, owner: np.ndarray, values: np.ndarray, most: int
) -> np.ndarray | None:
    """Which units a pruning of `most` filters may take, so that few are to be sorted: their places,
    or None for all.

    Left out are only units that go one by one, and are dearer than as many others as can go.

    Args:
        counts: per group, its units.
        owner, values: of each unit, its group and score.
    """
    single = np.array([g.schedule is None and g.multiple == 1 for g in groups], bool)
    stay = [
        count - group.most_removable(count) if alone else 0
        for group, count, alone in zip(groups, counts.tolist(), single.tolist(), strict=True)
    ]
    number = most + sum(stay)  # as some of the cheapest may have to stay
    if not 0 < 4 * number < counts[single].sum():
        return None
    if single.all():
        bound = np.partition(values, number - 1)[number - 1]
        return (~(values > bound)).nonzero()[0]
    alone = single[owner]
    bound = np.partition(values[alone], number - 1)[number - 1]
    return (~(alone & (values > bound))).nonzero()[0]


class _Bundles:
    """The units that could go at a pruning of `most` filters, as bundles, a group's in a row.

    The first bundle of a group brings its width to a multiple, each of the others holds as many
    units as the multiple says. Behind those of all groups come those of stages.

    Attributes:
        stages: of each, the groups that go in step, and how many units of each group are gone at
            one width after the other: [widths, members], from the present one on.
        owner: [b] int64, the place of each bundle's group, or behind those the place of its stage.
        worth: [b] float64, of each bundle.
        filters: [b] int64, how many go with it.
    """

    def __init__(
        self, groups: Sequence[Group], dead: Sequence[Tensor], scores: Sequence[Tensor], most: int
    ) -> None:
        sizes = np.array([gone.numel() for gone in dead], np.int64)
        of_all = np.arange(len(groups)).repeat(sizes)
        # In numpy, as waking PyTorch's threads takes longer than any of this.
        none = np.empty(0, bool)  # there are no groups where only blocks may go
        alive = (~np.concatenate([none, *(gone.numpy() for gone in dead)])).nonzero()[0]
        of_alive = of_all[alive]
        counts = np.bincount(of_alive, minlength=len(groups))
        values = np.concatenate([none, *(score.double().numpy() for score in scores)])[alive]
        held_units = counts
        looked_at = _could_go(groups, counts, of_alive, values, most)
        if looked_at is not None:
            alive, of_alive, values = alive[looked_at], of_alive[looked_at], values[looked_at]
            held_units = np.bincount(of_alive, minlength=len(groups))
        order = _stable_order(values)
        # Few different numbers in few bits, which numpy sorts without comparing any.
        small = np.min_scalar_type(len(groups))
        order = order[of_alive[order].astype(small).argsort(kind="stable")]
        ranked = values[order]
        self._begins = held_units.cumsum() - held_units
        self._units = (alive - (sizes.cumsum() - sizes)[of_alive])[order]

        numbers = []
        firsts = []
        for group, count, held in zip(groups, counts.tolist(), held_units.tolist(), strict=True):
            first = group.next_to_go(count)
            number = 0
            if first:
                number = 1 + (count - first - group.minimum) // group.multiple
                # Bundles behind `most` filters of one group cannot go at this pruning.
                enough = max(-(-most // group.filters_per_unit) - first, 0)
                number = min(number, 1 + -(-enough // group.multiple), held)
            numbers.append(number)
            firsts.append(first)
        self._first = np.array(firsts, np.int64)
        self._multiple = np.array([group.multiple for group in groups], np.int64)
        held = np.array(numbers, np.int64)
        start = held.cumsum() - held
        self.owner = np.arange(len(groups)).repeat(held)
        length = self._multiple.repeat(held)
        begin = (self._begins + self._first - self._multiple).repeat(held)
        begin += (np.arange(self.owner.size) - start.repeat(held)) * length
        opening = start[held > 0]
        begin[opening] = self._begins[held > 0]
        length[opening] = self._first[held > 0]
        per_unit = np.array([group.filters_per_unit for group in groups], np.int64)
        self.filters = length * per_unit.repeat(held)
        self.worth = ranked[begin]
        for width in set(np.bincount(length).nonzero()[0].tolist()) - {1}:
            at = (length == width).nonzero()[0]
            rows = torch.from_numpy(ranked[begin[at, None] + np.arange(width)])
            self.worth[at] = rows.mean(1).numpy()
        # Means of equal scores may differ by rounding; the first must still go first.
        for at in (self._multiple > 1).nonzero()[0].tolist():
            mine = self.worth[start[at] : start[at] + held[at]]
            np.maximum.accumulate(mine, out=mine)
        self.stages: list[tuple[list[int], np.ndarray]] = []
        for schedule, numbers in by_schedule(groups):
            kinds = [groups[number].kind for number in numbers]
            steps = schedule.steps(counts[numbers].tolist(), kinds)
            self._add_stage(numbers, steps[0] - steps, ranked, per_unit)

    def _add_stage(
        self, numbers: list[int], gone: np.ndarray, ranked: np.ndarray, per_unit: np.ndarray
    ) -> None:
        """The bundles of a stage.

        There are none whose units have no filters: their layers have gone with their blocks.
        """
        filters = gone @ per_unit[numbers]
        fewer = np.append(True, np.diff(filters) > 0)
        gone, filters = gone[fewer], filters[fewer]
        self.stages.append((numbers, gone))
        steps = len(gone) - 1
        total = np.zeros(len(gone))
        for begin, units in zip(self._begins[numbers].tolist(), gone.T, strict=True):
            total += np.append(0.0, ranked[begin : begin + units[-1]].cumsum())[units]
        # From the first bundle on that has a unit at infinity none goes.
        known = np.count_nonzero(np.isfinite(total)) - 1
        worth = np.full(steps, np.inf)
        worth[:known] = np.diff(total[: known + 1]) / np.diff(gone[: known + 1].sum(1))
        owner = len(self._begins) + len(self.stages) - 1
        self.owner = np.append(self.owner, np.full(steps, owner))
        self.filters = np.append(self.filters, np.diff(filters))
        self.worth = np.append(self.worth, np.maximum.accumulate(worth))

    def units_in(self, number: np.ndarray) -> np.ndarray:
        """How many units of each group the first so many bundles of each owner hold."""
        of_groups = number[: self._first.size]
        found = np.where(of_groups, self._first + (of_groups - 1) * self._multiple, 0)
        for (numbers, gone), steps in zip(self.stages, number[self._first.size :], strict=True):
            found[numbers] = gone[steps]
        return found

    def cheapest_units(self, counts: Sequence[int]) -> list[Tensor]:
        """Per group so many of its units, the cheapest, ascending."""
        nothing = torch.empty(0, dtype=torch.int64)
        return [
            torch.from_numpy(np.sort(self._units[begin : begin + count])) if count else nothing
            for begin, count in zip(self._begins.tolist(), counts, strict=True)
        ]
