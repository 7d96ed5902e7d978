"""Which axes of tables are one, and which tables hang together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Table
from taylor_kernels.tracing.notes.forest import Forest


def kinds_of(tables: Sequence[Table], label: Vector) -> list[list[int]]:
    """For each table the kind of each of its axes: axes that share a class are of one kind.

    Args:
        label: atom -> class.
    """
    names = [(n, d) for n, table in enumerate(tables) for d in range(len(table.axes))]
    number = {name: i for i, name in enumerate(names)}
    groups = _sharing([label[tables[n].axes[d]] for n, d in names])
    return [
        [int(groups[number[n, d]]) for d in range(len(table.axes))]
        for n, table in enumerate(tables)
    ]


def families_of(tables: Sequence[Table], label: Vector) -> tuple[list[int], Vector]:
    """The family of each table: those that share a class, of cells or axes, are of one.

    Args:
        label: atom -> class.

    Returns:
        Also, for each class, the number of a table that it is in; -1 where it is in none.
    """
    every = [label[np.concatenate([table.cells, *table.axes])] for table in tables]
    owner = np.full(label.size, -1)
    for number, classes in enumerate(every):
        owner[classes] = number
    owner[0] = -1
    return _sharing(every).tolist(), owner


def _sharing(vectors: Sequence[Vector]) -> Vector:
    """For each vector the number of the first one that it shares atoms with, by any detour."""
    groups = Forest(len(vectors))
    if vectors:
        atoms = np.concatenate(vectors)
        owner = np.repeat(np.arange(len(vectors)), [vector.size for vector in vectors])
        owner, atoms = owner[atoms != 0], atoms[atoms != 0]
        first = np.zeros(int(atoms.max(initial=0)) + 1, np.int64)
        first[atoms[::-1]] = owner[::-1]
        groups.unite([(first[atoms], owner)])
    return groups.label
