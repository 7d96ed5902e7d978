"""From what a run wrote down to classes of atoms that go together, and why the others stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from taylor_kernels.tracing.choosing import FREE, Chooser, Resolution
from taylor_kernels.tracing.forest import Forest
from taylor_kernels.tracing.record import Reason, Record, Size, Table, Vector

_ROUNDS = 8


def resolve(record: Record, lifted: Collection[str] = ()) -> Resolution:
    """Work out the classes.

    Args:
        lifted: kinds of mixers (`Reason.mixer`) that keep nothing.
    """
    forest = Forest(record.count)
    reasons = [Reason("is no parameter's")]
    why = np.full(record.count, FREE)
    why[0] = 0
    for vector, reason in record.fixed:
        if reason.mixer not in lifted or not reason.mixer:
            np.minimum.at(why, vector, len(reasons))
            reasons.append(reason)
    forest.unite(record.edges)
    # One attribute counts the same number wherever it is used.
    firsts: dict[tuple[str, str], Size] = {}
    for size in counted(record.sizes):
        first = firsts.setdefault((size.module, size.attribute), size)
        both = (first.atoms != 0) & (size.atoms != 0)
        forest.unite([(first.atoms[both], size.atoms[both])])
    _close(record.tables, forest)
    return Chooser(record, forest, why, reasons).resolution()


def counted(sizes: Sequence[Size]) -> list[Size]:
    """What attributes count, without weak evidence where there is better or where it disagrees."""
    strong = {(size.module, size.attribute) for size in sizes if not size.weak}
    first: dict[tuple[str, str], Vector] = {}
    differ = set()
    for size in sizes:
        key = (size.module, size.attribute)
        if size.weak and not np.array_equal(first.setdefault(key, size.atoms), size.atoms):
            differ.add(key)
    kept = []
    for size in sizes:
        key = (size.module, size.attribute)
        if not size.weak or (key not in strong and key not in differ):
            kept.append(size)
    return kept


def _close(tables: Sequence[Table], forest: Forest) -> None:
    """Cells with the same axes are one; axes of the same cells are one."""
    for _ in range(_ROUNDS):
        pairs: list[tuple[Vector, Vector]] = []
        seen: dict[tuple, Table] = {}
        rows: dict[int, list[tuple[Vector, Vector]]] = {}
        for table in tables:
            shape = tuple(axis.size for axis in table.axes)
            other = seen.setdefault((shape, forest.label[table.cells].tobytes()), table)
            if other is not table:
                pairs.extend(zip(table.axes, other.axes, strict=True))
            grids = np.meshgrid(*(forest.label[axis] for axis in table.axes), indexing="ij")
            key = np.sort(np.stack([grid.ravel() for grid in grids], 1), axis=1)
            rows.setdefault(len(shape), []).append((key, table.cells))
        for parts in rows.values():
            if len(parts) > 1:
                keys = np.concatenate([key for key, _ in parts])
                cells = np.concatenate([cell for _, cell in parts])
                _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
                same = cells[first][inverse.ravel()]
                both = (cells != 0) & (same != 0)
                pairs.append((cells[both], same[both]))
        if not forest.unite(pairs):
            return
