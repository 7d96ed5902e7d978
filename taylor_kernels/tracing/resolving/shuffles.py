"""Shuffles: a dimension cut into a grid that is transposed and made one dimension again.

Nothing but the order of the channels comes of it, so more can go than a row of the grid. Behind a
shuffle of G groups, position p holds a channel of group p mod G. What is left stays in its order as
long as that holds for the positions that are left: any G channels that follow each other can go,
wherever they begin. A convolution of groups that reads them loses the same places of each group;
where G does not divide the width of a group, such runs begin anew with each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.entries import Table
from taylor_kernels.tracing.notes.forest import Forest
from taylor_kernels.tracing.notes.record import Record


@dataclass(frozen=True)
class Shuffle:
    """A shuffle, seen along one of its two axes.

    Attributes:
        live: (table, dimension) of the axis, where it is cut and where it is made one again.
        cells: the channels in the order in which this axis is the outer one.
        width: how many of them lie at one place of this axis.
        reason: why channels that no run covers stay.
    """

    live: tuple[tuple[int, int], tuple[int, int]]
    cells: Vector
    width: int
    reason: Reason


def shuffles(record: Record, label: Vector) -> list[Shuffle]:
    """The shuffles of a run, along each axis that has no other use."""
    pairs = _pairs(record.tables, label)
    if not pairs:
        return []
    sides: dict[int, list[Shuffle]] = {}
    for before, after in pairs:
        first, last = record.tables[before], record.tables[after]
        module, operation = last.where
        text = f"is left over where a shuffle is cut into runs ({operation} in {module!r})"
        reason = Reason(text, module, operation)
        ends = (
            Shuffle(((before, 1), (after, 0)), last.cells, last.axes[1].size, reason),
            Shuffle(((before, 0), (after, 1)), first.cells, first.axes[1].size, reason),
        )
        for shuffle in ends:
            key = int(label[record.tables[before].axes[shuffle.live[0][1]][0]])
            sides.setdefault(key, []).append(shuffle)
    used = _used_elsewhere(record, label)
    places, place_of, members = _axes(record, label)
    found = []
    for mine in sides.values():
        own = [record.tables[n].axes[d] for shuffle in mine for n, d in shuffle.live]
        atoms = np.unique(np.concatenate(own))
        chosen = np.zeros(label.size, bool)
        chosen[label[atoms]] = True
        whole = np.count_nonzero(chosen[label]) == atoms.size
        tables = {place for shuffle in mine for place in shuffle.live}
        alone = tables.issuperset(places[i] for i in np.unique(place_of[chosen[members]]))
        if whole and alone and not (used & chosen).any():
            found += mine
    return found


def _pairs(tables: Sequence[Table], label: Vector) -> list[tuple[int, int]]:
    """The tables that make a grid one dimension again, each behind the last one whose grid was
    transposed before that."""
    found = []
    # Most tables have other axes, which bytes tell at once.
    by_axes: dict[tuple[bytes, ...], list[int]] = {}
    for after, last in enumerate(tables):
        if len(last.axes) != 2 or last.kind != "reshape":
            continue
        axes = tuple(label[axis].tobytes() for axis in last.axes)
        for before in reversed(by_axes.get(axes[::-1], [])):
            first = tables[before]
            grid = label[first.cells].reshape([axis.size for axis in first.axes])
            if np.array_equal(grid.T.ravel(), label[last.cells]):
                found.append((before, after))
                break
        by_axes.setdefault(axes, []).append(after)
    return found


def _axes(record: Record, label: Vector) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """The classes along all axes of all tables, end to end.

    Returns:
        (table, dimension) of each axis; which of these each element is of; the elements' classes.
    """
    axes = {(n, d): a for n, table in enumerate(record.tables) for d, a in enumerate(table.axes)}
    place_of = np.repeat(np.arange(len(axes)), [axis.size for axis in axes.values()])
    return list(axes), place_of, label[np.concatenate(list(axes.values()))]


def _used_elsewhere(record: Record, label: Vector) -> np.ndarray:
    """[atoms] bool: classes that something other than a table depends on."""
    used = np.zeros(label.size, bool)
    used[label[list(record.seen)]] = True
    for vector in (*(size.atoms for size in record.sizes), *(v for v, _ in record.fixed)):
        used[label[vector]] = True
    return used


def runs(shuffle: Shuffle, forest: Forest) -> Vector:
    """Make the channels of each run one.

    Returns:
        The atoms that no run covers.
    """
    cells, width = shuffle.cells, shuffle.width
    period = _period(forest.label[cells])
    if period < width:
        period = cells.size
    place = np.arange(cells.size)
    inside = place % period
    first = place - inside % width
    covered = (inside - inside % width + width <= period) & (first + width <= cells.size)
    forest.unite([(cells[first[covered]], cells[covered])])
    return cells[~covered]


def _period(labels: Vector) -> int:
    """After how many places the labels come again."""
    for period in np.flatnonzero(labels == labels[0])[1:].tolist():
        if np.array_equal(labels[period:], labels[:-period]):
            return int(period)
    return int(labels.size)
