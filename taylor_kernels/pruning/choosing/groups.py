"""Groups that the pruner takes units from: the traced ones, without those that have to stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm

import numpy as np

from taylor_kernels import tracing
from taylor_kernels.pruning.choosing.schedules import Schedule
from taylor_kernels.tracing import IN, OUT, Channels
from taylor_kernels.tracing.resolving.arrangement import Stage


@dataclass(frozen=True)
class Group(tracing.Group):
    """A traced group, and how many of its units may go.

    Its producers are layers whose filters can be scored, and no others.

    Attributes:
        multiple: so many units go together; the units that remain are a multiple of it, or all of
            those there were.
        minimum: so many remain at least.
        schedule: of a group of a stage, whose units go in step with those of others; the above
            says nothing then.
    """

    multiple: int = 1
    minimum: int = 1
    schedule: Schedule | None = None

    @cached_property
    def filters_per_unit(self) -> int:
        return sum(slot.index.size(1) for slot in self.producers)

    def next_to_go(self, alive: int) -> int:
        """How many units go next where `alive` are left; 0 at the minimum, and where all layers
        have gone with their blocks, as well as in a stage, where no group goes alone."""
        if not self.filters_per_unit or self.schedule is not None:
            return 0
        count = alive % self.multiple or self.multiple
        return count if alive - count >= self.minimum else 0

    def most_removable(self, alive: int) -> int:
        """How many of the `alive` units go at most."""
        if not self.filters_per_unit:
            return 0
        if self.schedule is not None:
            return max(alive - int(self.schedule.least[self.kind]), 0)
        first = self.next_to_go(alive)
        if not first:
            return 0
        return first + (alive - first - self.minimum) // self.multiple * self.multiple


def choose_groups(
    channels: Channels,
    layers: Collection[str],
    ignored: Collection[str],
    unscored: Mapping[str, str],
    round_to: int,
    min_filters: int,
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be pruned, and layer -> reason for the layers that cannot.

    Args:
        layers: those whose filters are counted, and scored if they can be.
        ignored: modules whose filters stay.
        unscored: layers that the criterion cannot score -> why.
    """
    groups: list[Group] = []
    skipped: dict[str, str] = {}
    stopped: dict[Schedule | None, str] = {}  # stages of which a group cannot go
    schedules = _schedules(channels, layers, round_to, min_filters)
    for traced in channels.groups:
        slots = [slot for slot in traced.slots if slot.side == IN or slot.owner in layers]
        if all(slot.side == IN for slot in slots):
            continue
        experts = channels.experts_needed(traced)
        # A norm of one channel gives the same whatever it reads; a squeeze() drops its dimension.
        lonely = channels.least_normalised(traced.classes) == 1
        least = max(2 if lonely or channels.is_squeezed(traced.classes) else 1, experts)
        # How many experts there are is no width of a layer.
        group = _group(traced, slots, 1 if experts else round_to, min_filters, least_units=least)
        if traced.stage is not None:
            group = replace(group, schedule=schedules[traced.stage])
        reason = _obstacle(channels, traced, ignored)
        if not reason and all(slot.owner in unscored for slot in group.producers):
            reason = unscored[group.name]
        if not reason and not (group.next_to_go(group.size) or _goes_in_step(group)):
            least = group.minimum * min(slot.index.size(1) for slot in group.producers)
            reason = f"it must keep all its filters (at least {least}, in units that go together)"
        if reason:
            for slot in group.producers:
                skipped.setdefault(slot.owner, reason)
        if reason and group.schedule is not None:
            stopped.setdefault(group.schedule, reason)
        if not reason or group.schedule is not None:
            groups.append(group)
    for schedule, reason in stopped.items():
        for group in groups:
            if group.schedule is schedule:
                for slot in group.producers:
                    skipped.setdefault(slot.owner, reason)
    groups = [group for group in groups if group.schedule not in stopped]
    for name in layers:
        if name in channels.skipped:
            skipped[name] = channels.skipped[name]
        elif name not in channels.layers:
            skipped[name] = channels.why_no_layer(name)
    return groups, skipped


def by_schedule(groups: Sequence[Group]) -> list[tuple[Schedule, list[int]]]:
    """The schedules of groups, each with the numbers of those that follow it."""
    found: dict[int, tuple[Schedule, list[int]]] = {}
    for number, group in enumerate(groups):
        if group.schedule is not None:
            found.setdefault(id(group.schedule), (group.schedule, []))[1].append(number)
    return list(found.values())


def _group(
    traced: tracing.Group,
    slots: list[tracing.Slot],
    round_to: int,
    min_filters: int,
    *,
    least_units: int,
) -> Group:
    producers = [slot for slot in slots if slot.side == OUT]
    multiple = lcm(*(round_to // gcd(round_to, slot.index.size(1)) for slot in producers))
    least = max(least_units, *(-(-min_filters // slot.index.size(1)) for slot in producers))
    return Group(
        tuple(slots), traced.entries, traced.classes, traced.norms,
        traced.stage, traced.kind,
        multiple=multiple, minimum=-(-least // multiple) * multiple,
    )  # fmt: skip


def _schedules(
    channels: Channels, layers: Collection[str], round_to: int, min_filters: int
) -> dict[Stage, Schedule]:
    """How each stage shrinks, so that the widths of its layers are multiples."""
    stages: dict[Stage, list[tracing.Group]] = {}
    for group in channels.groups:
        if group.stage is not None:
            stages.setdefault(group.stage, []).append(group)
    found = {}
    for stage, groups in stages.items():
        widths: dict[str, np.ndarray] = {}  # of each layer, at each width of the stage
        for group in groups:
            for slot in group.producers:
                if slot.owner in layers:
                    filters = stage.counts[:, group.kind] * slot.index.size(1)
                    widths[slot.owner] = widths.get(slot.owner, 0) + filters
        fits = [(own % round_to == 0) & (own >= max(min_filters, 1)) for own in widths.values()]
        found[stage] = Schedule(stage.counts, np.logical_and.reduce(fits))
    return found


def _goes_in_step(group: Group) -> bool:
    return group.schedule is not None and len(group.schedule.steps()) > 1


def _obstacle(channels: Channels, group: tracing.Group, ignored: Collection[str]) -> str:
    """The module to ignore whose filters these are, or whose vectors go with them."""
    if not ignored:
        return ""

    def holders(slots: Sequence[tracing.Slot]) -> set[str]:
        weights = [channels.weights_of(slot.owner) for slot in slots]
        return {name.rpartition(".")[0] for of_slot in weights for name, _ in of_slot}

    producers = holders(group.producers)
    readers = holders(group.slots) - producers
    for entry in group.entries:
        owner = entry.tensor.rpartition(".")[0]
        if owner in ignored and owner not in readers:
            return f"{owner!r} is ignored"
    return ""
