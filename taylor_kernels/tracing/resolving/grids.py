"""All tables of a run as a few arrays: which cell goes where which places on the axes go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Table
from taylor_kernels.tracing.notes.forest import Forest

#: More than the number of any reason: nothing keeps this atom.
FREE = np.iinfo(np.int64).max
_ROUNDS = 32


@dataclass(frozen=True)
class Grids:
    """The cells of all tables of as many axes.

    Attributes:
        cells: [n], the cells of one table after the other.
        axes: [axes, n], for each cell the places on the axes that it belongs to.
    """

    cells: Vector
    axes: Vector


def grids_of(tables: Sequence[Table]) -> list[Grids]:
    """The tables, those of as many axes together."""
    parts: dict[int, list[tuple[Vector, Vector]]] = {}
    for table in tables:
        shape = tuple(axis.size for axis in table.axes)
        grid = np.empty((len(shape), *shape), np.int64)
        for dim, axis in enumerate(table.axes):
            grid[dim] = axis.reshape([-1 if i == dim else 1 for i in range(len(shape))])
        parts.setdefault(len(shape), []).append((table.cells, grid.reshape(len(shape), -1)))
    return [
        Grids(np.concatenate([c for c, _ in part]), np.concatenate([g for _, g in part], axis=1))
        for part in parts.values()
    ]


def settle(grids: Sequence[Grids], forest: Forest, why: Vector) -> Vector:
    """Reasons spread over classes, and between cells and axes."""
    label = forest.label
    by_class = np.full(why.size, FREE)
    np.minimum.at(by_class, label, why)
    labelled = [(label[grid.cells], label[grid.axes]) for grid in grids]
    for _ in range(_ROUNDS):
        before = by_class.copy()
        for cells, axes in labelled:
            np.minimum.at(by_class, cells, by_class[axes].max(axis=0))
            for axis in axes:
                np.minimum.at(by_class, axis, by_class[cells])
        if np.array_equal(before, by_class):
            break
    return by_class[label]
