"""The groups of a trace: classes of one make, and everything that goes with a unit of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from taylor_kernels.tracing.answer.layers import Layers
from taylor_kernels.tracing.answer.units import IN, OUT, Entry, Group, Place, Slot, collect, in_step
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.resolving.arrangement import Stage


def find_groups(
    layers: Layers,
    dims: Mapping[tuple[str, int], Vector],
    norms: Sequence[tuple[str, Vector]],
    fills: Mapping[str, Mapping[int, float]],
    free: npt.NDArray[np.bool_],
    stages: Sequence[Stage] = (),
) -> list[Group]:
    """Groups of interchangeable units, in the order of the model's layers.

    A unit is a class that an output channel of a layer is in. One that is all of its make has to
    stay, and is in no group, unless it is in a stage, where others of other makes may.

    Args:
        dims: (parameter or buffer, dimension) -> the classes along it.
        norms: [(module, classes)] of norms that work channel by channel, in running order.
        fills: tensor -> dimension -> what masked entries hold, where that is not zero.
        free: [classes] bool, classes that nothing keeps.
        stages: chains of shuffles, whose groups go in step.
    """
    ordered = sorted(layers.sides, key=layers.place)
    outputs: list[Place] = [((name, OUT), layers.sides[name][1]) for name in ordered]
    inputs: list[Place] = [((name, IN), layers.sides[name][0]) for name in ordered]
    produced = np.zeros(free.size, bool)
    for _, vector in outputs:
        produced[vector] = True
    found = collect([*outputs, *inputs, *dims.items()], free & produced)
    staged = set().union(*(stage.kind_of for stage in stages))
    made = [item for item in found if len(item[0]) > 1 or int(item[0][0]) in staged]
    behind = _norms_behind([classes.numpy() for classes, _ in made], norms, free.size)
    groups = []
    for (classes, table), names in zip(made, behind, strict=True):
        slots = [
            Slot(owner, side, rows)
            for (owner, side), rows in table.items()
            if isinstance(side, str)
        ]
        entries = [
            Entry(tensor, dim, rows, fills.get(tensor, {}).get(dim, 0.0))
            for (tensor, dim), rows in table.items()
            if isinstance(dim, int)
        ]
        slots.sort(key=lambda slot: layers.place(slot.owner))
        groups.append(Group(tuple(slots), tuple(entries), classes, names))
    return in_step(sorted(groups, key=lambda group: layers.place(group.name)), stages)


def _norms_behind(
    groups: Sequence[Vector], norms: Sequence[tuple[str, Vector]], count: int
) -> list[tuple[str, ...]]:
    """For each group of classes the norms that read any of them."""
    group_of = np.full(count, -1)
    for number, classes in enumerate(groups):
        group_of[classes] = number
    found: list[dict[str, None]] = [{} for _ in groups]
    for name, vector in norms:
        for number in dict.fromkeys(group_of[vector].tolist()):
            if number >= 0:
                found[number][name] = None
    return [tuple(names) for names in found]
