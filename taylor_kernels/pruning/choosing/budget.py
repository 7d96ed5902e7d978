"""What a pruner is to keep of a model, and how much it may take at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from taylor_kernels.pruning.choosing.flops import Cost, Meter
from taylor_kernels.pruning.choosing.groups import Group, by_schedule
from taylor_kernels.tracing import Block

#: Why a layer has no score though its criterion is one of it.
UNREAD = "no gradient reaches its output: everything before is frozen, or it is never called"
SILENT = "all its scores so far are 0, as where no loss has depended on it"
#: Reasons, and layers of each, that a message names.
_SHOWN = 4


class Budget:
    """Targets as absolute counts, checked to be in reach.

    Args:
        meter: of the whole model; it is left as it was.
        targets: the fractions to keep of "flops", "params" or "filters".
        per_step: filters that go at a pruning: a count, or a fraction of those of the whole model.
        blocks: residual blocks that may go too.
        remedy: what to do about a target that is out of reach.

    Attributes:
        whole: the cost of the model as it was at first.
        filters: how many filters go at a pruning.

    Raises:
        ValueError: a target is not met with every group at its minimum; the message has the least
            fraction that is.
    """

    def __init__(
        self,
        meter: Meter,
        groups: Sequence[Group],
        targets: Mapping[str, float],
        per_step: int | float,
        blocks: Sequence[Block] = (),
        remedy: str = "raise the target",
    ) -> None:
        self.whole: Cost = meter.cost
        _check_reachable(meter, groups, targets, blocks, remedy)
        self._limits = {name: kept * getattr(self.whole, name) for name, kept in targets.items()}
        self.filters = (
            per_step if isinstance(per_step, int) else max(1, round(per_step * self.whole.filters))
        )

    def met(self, meter: Meter) -> bool:
        """Whether every cost is within its limit."""
        cost = meter.cost
        return all(getattr(cost, name) <= limit for name, limit in self._limits.items())

    def check_in_reach(
        self,
        meter: Meter,
        groups: Sequence[Group],
        dead: Sequence[Tensor],
        unscored: Sequence[bool],
        blocks: Sequence[Block] = (),
    ) -> None:
        """It can be met by units of the groups that have scores; arguments as of `in_reach`.

        Raises:
            RuntimeError: it cannot; the message names the others.
        """
        if any(unscored) and not self.in_reach(meter, groups, dead, unscored, blocks):
            without = [group for group, absent in zip(groups, unscored, strict=True) if absent]
            names = dict.fromkeys(slot.owner for group in without for slot in group.producers)
            targets = ", ".join(self._limits)
            if names:
                raise RuntimeError(
                    f"{targets}: cannot be reached without filters of {', '.join(names)}, which "
                    f"have no score ({UNREAD}); raise the target, or run the passes inside "
                    "tk.scoring(model)"
                )
            readers = dict.fromkeys(slot.owner for group in without for slot in group.slots)
            raise RuntimeError(
                f"{targets}: cannot be reached without input channels of {', '.join(readers)}, "
                "which no layer has a score of any more: all that made them have gone with their "
                "blocks; raise the target, or let one of these blocks stay by ignore="
            )

    def in_reach(
        self,
        meter: Meter,
        groups: Sequence[Group],
        dead: Sequence[Tensor],
        staying: Sequence[bool],
        blocks: Sequence[Block] = (),
    ) -> bool:
        """Whether it can be met by units of some groups.

        Args:
            dead: per group [U] bool, units gone already.
            staying: of each group, whether none of its units are to go.
            blocks: those that are left and may go.
        """
        alive = [int((~gone).sum()) for gone in dead]
        most = [
            0 if stays else group.most_removable(count)
            for group, count, stays in zip(groups, alive, staying, strict=True)
        ]
        for schedule, numbers in by_schedule(groups):
            kinds = [groups[number].kind for number in numbers]
            lost = schedule.steps([alive[number] for number in numbers], kinds)
            lost = lost[0] - lost
            stays = [staying[number] for number in numbers]
            # It goes through its widths as long as none takes a channel that is to stay.
            furthest = lost[~lost[:, stays].any(1)][-1]
            for number, count in zip(numbers, furthest.tolist(), strict=True):
                most[number] = count
        with _without(meter, groups, most, blocks):
            return self.met(meter)


@contextmanager
def _without(
    meter: Meter, groups: Sequence[Group], units: Sequence[int], blocks: Sequence[Block]
) -> Iterator[None]:
    """Inside, the meter counts so many units of each group and these blocks as gone."""
    for group, count in zip(groups, units, strict=True):
        meter.take(group, count)
    for block in blocks:
        meter.leave(block)
    yield
    for block in blocks:
        meter.leave(block, back=True)
    for group, count in zip(groups, units, strict=True):
        meter.take(group, -count)


def _check_reachable(
    meter: Meter,
    groups: Sequence[Group],
    targets: Mapping[str, float],
    blocks: Sequence[Block],
    remedy: str,
) -> None:
    whole = meter.cost
    if "flops" in targets and not whole.flops:
        raise ValueError(
            "example_inputs: the model does no FLOPs on them, so a fraction of its FLOPs says "
            "nothing; give them a batch of at least one"
        )
    most = [group.most_removable(group.size) for group in groups]
    with _without(meter, groups, most, blocks):
        least = meter.cost.over(whole)
    for name, target in targets.items():
        if least[name] > target:
            # Rounded up, so that the fraction in the message is one that can be reached.
            reachable = -(-least[name] * 1e4 // 1) / 1e4
            raise ValueError(
                f"{name}: {target} cannot be reached; with every layer at its minimum "
                f"{reachable:.4f} of the {name} remain; {remedy}"
            )


def remedy_out_of_reach(skipped: Mapping[str, str], round_to: int, min_filters: int) -> str:
    """What to do about a target that is out of reach, and which layers stay whole.

    Args:
        skipped: layers that cannot be pruned -> why.
    """
    bounds = {"round_to": round_to, "min_filters": min_filters}
    ways = [f"lower {name}" for name, least in bounds.items() if least > 1]
    others = {name: why for name, why in skipped.items() if not why.endswith("is ignored")}
    if len(others) < len(skipped):
        ways.append("ignore fewer layers")
    whole = f"; all filters stay of {_by_reason(others)}" if others else ""
    return ", or ".join(["raise the target", *ways]) + whole


def _by_reason(layers: Mapping[str, str]) -> str:
    """Layers with the reasons that they have; of many those that most have, and their first."""
    shared: dict[str, list[str]] = {}
    for name, reason in layers.items():
        shared.setdefault(reason, []).append(name or "the model itself")
    most = sorted(shared.items(), key=lambda item: -len(item[1]))
    found = [
        f"{', '.join(names[:_SHOWN])}{_more(names)} ({reason})" for reason, names in most[:_SHOWN]
    ]
    return ", ".join(found) + _more(most)


def _more(found: Sequence[object]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
