"""Which units go next: one ranking over all groups, under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taylor_kernels.pruning.flops import Meter
from taylor_kernels.pruning.units import Group

#: What a target can be set for; a fraction of the whole to keep.
TARGETS = ("flops", "params", "filters")


def met(meter: Meter, limits: Mapping[str, float]) -> bool:
    """Whether every cost is within its limit (an absolute count)."""
    cost = meter.cost
    return all(getattr(cost, name) <= limit for name, limit in limits.items())


def check_reachable(meter: Meter, groups: Sequence[Group], targets: Mapping[str, float]) -> None:
    """Targets that can be met with every group at its minimum; the meter is left as it was.

    Raises:
        ValueError: one cannot; the message has the least fraction that can.
    """
    whole = meter.cost
    if "flops" in targets and not whole.flops:
        raise ValueError(
            "example_inputs: the model does no FLOPs on them, so a fraction of its FLOPs says "
            "nothing; give them a batch of at least one"
        )
    most = [group.most_removable() for group in groups]
    for group, units in zip(groups, most, strict=True):
        meter.take(group, units)
    least = meter.cost.over(whole)
    for group, units in zip(groups, most, strict=True):
        meter.take(group, -units)
    for name, target in targets.items():
        if least[name] > target:
            # Rounded up, so that the fraction in the message is one that can be reached.
            reachable = -(-least[name] * 1e4 // 1) / 1e4
            raise ValueError(
                f"{name}: {target} cannot be reached; with every layer at its minimum "
                f"{reachable:.4f} of the {name} remain. Raise the target, or lower round_to or "
                "min_filters, or ignore fewer layers"
            )


def select(
    groups: Sequence[Group],
    dead: Sequence[Tensor],
    scores: Sequence[Tensor],
    meter: Meter,
    limits: Mapping[str, float],
    filters: int,
) -> list[Tensor]:
    """The units to remove now, cheapest first, until `filters` have gone or the limits are met.

    Units go in the lots of their group. A lot is worth the mean score of its units, which for
    lots of one is a plain sort of all units; the worth of a group's lots ascends, so none goes
    before one that is cheaper. Ties go by the order of the groups, then of the units.

    Args:
        dead: per group [U] bool, units gone already.
        scores: per group [U] float, on the CPU.
        meter: counts the units taken here as gone.

    Returns:
        Per group [n] int64, ascending; all empty if nothing can go.
    """
    lots: list[tuple[float, int, int, Tensor]] = []
    for number, (group, gone, score) in enumerate(zip(groups, dead, scores, strict=True)):
        alive = (~gone).nonzero().flatten()
        order = alive[torch.sort(score[alive].double(), stable=True).indices]
        worth = score[order].double()
        done = 0
        # More than `filters` of one group cannot go now.
        while done * group.filters_per_unit < filters:
            lot = group.next_lot(alive.numel() - done)
            if not lot:
                break
            chunk = slice(done, done + lot)
            lots.append((worth[chunk].mean().item(), number, done, order[chunk]))
            done += lot
    lots.sort(key=lambda lot: lot[:3])

    taken: list[list[Tensor]] = [[] for _ in groups]
    count = 0
    for _, number, _, units in lots:
        if count >= filters or met(meter, limits):
            break
        meter.take(groups[number], units.numel())
        taken[number].append(units)
        count += units.numel() * groups[number].filters_per_unit
    nothing = torch.empty(0, dtype=torch.int64)
    return [torch.cat(parts).sort().values if parts else nothing for parts in taken]
