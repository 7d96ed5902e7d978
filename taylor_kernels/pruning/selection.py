"""Which units go next: one ranking over all groups, under a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.pruning.budget import Budget
from taylor_kernels.pruning.flops import Meter
from taylor_kernels.pruning.groups import Group


def select(
    groups: Sequence[Group],
    dead: Sequence[Tensor],
    scores: Sequence[Tensor],
    meter: Meter,
    budget: Budget,
) -> list[Tensor]:
    """The units to remove now, cheapest first, until `budget.filters` have gone or it is met.

    The units of a group go in bundles that keep its width a multiple. A bundle is worth the mean
    score of its units, which for bundles of one is a plain sort of all units; the worth of a
    group's bundles ascends, so that none goes before one that is cheaper. Ties go by the order of
    the groups, then of the units.

    Args:
        dead: per group [U] bool, units gone already.
        scores: per group [U] float, on the CPU; units at infinity do not go.
        meter: counts the units taken here as gone.

    Returns:
        Per group [n] int64, ascending; all empty if nothing can go.
    """
    bundles = [
        _Bundles(group, gone, score, budget.filters)
        for group, gone, score in zip(groups, dead, scores, strict=True)
    ]
    counts = torch.tensor([bundle.worth.numel() for bundle in bundles])
    owner = torch.arange(len(groups)).repeat_interleave(counts)
    filters = torch.tensor([g.multiple * g.filters_per_unit for g in groups])[owner]
    for place, start in enumerate((counts.cumsum(0) - counts).tolist()):
        if counts[place]:
            filters[start] = bundles[place].units_in(1) * groups[place].filters_per_unit
    least = int(filters.min()) if filters.numel() else 1
    worth = torch.cat([bundle.worth for bundle in bundles])
    order = _cheapest(worth, min(-(-budget.filters // least), worth.numel()))
    owner, filters = owner[order], filters[order].cumsum(0)
    # One bundle more than stays below the number of filters, and none that has no score.
    most = int(torch.searchsorted(filters, budget.filters)) + 1
    most = min(most, int(worth[order].isfinite().sum()))

    taken = [0] * len(groups)  # bundles that the meter counts as gone

    def take(number: int) -> None:
        """Let the meter count the cheapest `number` bundles as gone, and no others."""
        wanted = torch.bincount(owner[:number], minlength=len(groups)).tolist()
        for place, bundle in enumerate(bundles):
            units = bundle.units_in(wanted[place]) - bundle.units_in(taken[place])
            if units:
                meter.take(groups[place], units)
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
    nothing = torch.empty(0, dtype=torch.int64)
    return [
        bundle.order[: bundle.units_in(number)].sort().values if number else nothing
        for bundle, number in zip(bundles, taken, strict=True)
    ]


def _cheapest(values: Tensor, number: int) -> Tensor:
    """[number] int64: where the least values are, ascending; equal ones in the order they have."""
    if 4 * number >= values.numel():
        return values.sort(stable=True).indices[:number]
    # Few are wanted: those that are as small as the last of them are fewer to sort than all.
    bound = values.kthvalue(number).values if number else -torch.inf
    found = (values <= bound).nonzero().flatten()
    return found[values[found].sort(stable=True).indices[:number]]


class _Bundles:
    """The units of a group that could go at a pruning of `most` filters, as bundles.

    The first bundle brings the width to a multiple, each of the others holds as many units as the
    multiple says.

    Attributes:
        order: [n] int64, the units, cheapest first.
        worth: [b] float64, of each bundle.
    """

    def __init__(self, group: Group, gone: Tensor, score: Tensor, most: int) -> None:
        alive = (~gone).nonzero().flatten()
        self._first = group.next_to_go(alive.numel())
        self._multiple = group.multiple
        number = 0
        if self._first:
            number = 1 + (alive.numel() - self._first - group.minimum) // group.multiple
            # Bundles behind `most` filters of one group cannot go at this pruning.
            enough = max(-(-most // group.filters_per_unit) - self._first, 0)
            number = min(number, 1 + -(-enough // group.multiple))
        units = self.units_in(number)
        self.order = alive[_cheapest(score[alive].double(), units)]
        ranked = score[self.order].double()
        if self._multiple > 1 and number:
            rest = ranked[self._first :].view(-1, self._multiple)
            ranked = torch.cat((ranked[: self._first].mean()[None], rest.mean(1)))
            # Means of equal scores may differ by rounding; the first must still go first.
            ranked = ranked.cummax(0).values
        self.worth = ranked

    def units_in(self, number: int) -> int:
        """How many units the first `number` bundles hold."""
        return self._first + (number - 1) * self._multiple if number else 0
