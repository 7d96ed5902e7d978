"""Which shuffles of a run are chains, and what a run says without them.

A chain is two shuffles or more that channels go through one after the other, where nothing but
convolutions, norms channel by channel and cuts into segments has to do with these channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.chains import Chain, Turn
from taylor_kernels.tracing.notes.entries import Join, Size, Table
from taylor_kernels.tracing.notes.forest import Forest
from taylor_kernels.tracing.notes.record import Record


class _Shuffle(NamedTuple):
    """The numbers of the tables before and behind a shuffle, and the dimension of the grid that can
    shrink."""

    before: int
    after: int
    live: int


def find_shuffles(record: Record) -> list[_Shuffle]:
    """The shuffles along a dimension of whose grid nothing else depends; none if there is but
    one."""
    axes: dict[tuple[bytes, ...], int] = {}
    pairs = []
    for number, table in enumerate(record.tables):
        if table.kind == "reshape" and len(table.axes) == 2:
            key = tuple(axis.tobytes() for axis in table.axes)
            if (before := axes.get(key[::-1])) is not None:
                pairs.append((before, number))
            axes[key] = number
    if len(pairs) < 2:
        return []
    uses = _uses(record, [axis for before, _ in pairs for axis in record.tables[before].axes])
    found = []
    for before, after in pairs:
        first, last = record.tables[before], record.tables[after]
        free = [
            dim
            for dim in first.allowed
            if 1 - dim in last.allowed and (uses[first.axes[dim]] == 2).all()
        ]
        if free:
            live = max(free, key=lambda dim: first.axes[dim].size)
            found.append(_Shuffle(before, after, live))
    return found


def with_chains(
    record: Record, shuffles: Sequence[_Shuffle], label: Vector, counted: Sequence[Size]
) -> Record | None:
    """The record where the channels of chains go one by one, and may change places.

    Args:
        shuffles: of `find_shuffles`.
        label: for each atom the one that it goes by, after all that has met.
        counted: what attributes count.

    Returns:
        None where there are no chains.
    """
    chains = []
    tables: set[int] = set()
    joins: list[Join] = []
    named: dict[tuple[str, str], Size] = {}
    chained = np.zeros(record.count, bool)
    for numbers in _connected(record, shuffles, label):
        mine = [
            (record.tables[before], record.tables[after], live) for before, after, live in numbers
        ]
        atoms = np.zeros(record.count, bool)
        for first, last, _ in mine:
            atoms[label[first.cells]] = atoms[label[last.cells]] = True
        own = {table for before, after, _ in numbers for table in (before, after)}
        if len(mine) < 2 or _seen_elsewhere(record, own, label, atoms):
            continue
        chain, sizes = _chain(record, mine, label, atoms), _sizes(mine, label, atoms, counted)
        if chain is None or sizes is None:
            continue
        named |= sizes
        chains.append(chain)
        tables |= own
        chained |= atoms
        for first, last, _ in mine:
            shape = [axis.size for axis in first.axes]
            turned = first.cells.reshape(shape).T.flatten()
            joins.append(Join(last.cells, turned, last.where, len(record.fixed)))
    if not chains:
        return None
    return replace(
        record,
        joins=[*record.joins, *joins],
        tables=[table for n, table in enumerate(record.tables) if n not in tables],
        cuts=[cut for cut in record.cuts if not chained[label[cut.vector]].any()],
        sizes=[
            *(size for size in record.sizes if (size.module, size.attribute) not in named),
            *named.values(),
        ],
        chains=chains,
    )


def _uses(record: Record, axes: Sequence[Vector]) -> Vector:
    """[atoms] int64: how many vectors of a run have each atom of these axes, and 3 more for those
    that something else has seen. Of other atoms it says nothing."""
    asked = np.zeros(record.count, bool)
    for axis in axes:
        asked[axis] = True
    vectors = list(_of_axes(record))
    every = np.concatenate(vectors)
    places = np.flatnonzero(asked[every])
    owner = np.searchsorted(np.cumsum([vector.size for vector in vectors]), places, "right")
    # One that a vector has several times counts once.
    once = np.unique(owner * record.count + every[places]) % record.count
    uses = np.bincount(once, minlength=record.count)
    uses[list(record.seen)] += 3
    return uses


def _of_axes(record: Record) -> Iterator[Vector]:
    """Everything that says something of atoms and may speak of the axes of a grid."""
    for join in record.joins:
        yield from (join.one, join.other)
    for table in record.tables:
        yield from (table.cells, *table.axes)
    yield from (vector for vector, _ in record.fixed)
    yield from (cut.vector for cut in record.cuts)
    yield from record.heads


def _connected(record: Record, shuffles: Sequence[_Shuffle], label: Vector) -> list[list[_Shuffle]]:
    """The shuffles in sets of those that channels go through one after the other."""
    forest = Forest(label.size + len(shuffles))
    links = []
    for number, (before, after, _) in enumerate(shuffles):
        atoms = np.concatenate([record.tables[n].cells for n in (before, after)])
        links.append((label[atoms[atoms != 0]], np.array([label.size + number])))
    forest.unite([(atoms, np.broadcast_to(one, atoms.shape)) for atoms, one in links])
    found: dict[int, list[_Shuffle]] = {}
    for shuffle, root in zip(shuffles, forest.label[label.size :].tolist(), strict=True):
        found.setdefault(root, []).append(shuffle)
    return list(found.values())


def _seen_elsewhere(
    record: Record, own: set[int], label: Vector, atoms: npt.NDArray[np.bool_]
) -> bool:
    """Whether something sees in which order channels lie, or keeps them.

    Args:
        own: the numbers of the tables of the shuffles.
        atoms: [atoms] bool, the channels.
    """
    others: list[Vector] = [vector for vector, _ in record.fixed]
    for number, table in enumerate(record.tables):
        others += table.axes if number in own else (table.cells, *table.axes)
    for join in record.joins:
        lone = (join.one == 0) != (join.other == 0)
        others.append(np.maximum(join.one, join.other)[lone])
    others += [vector for call in record.across for vector in call.vectors]
    others += [
        vector
        for _, calls in record.norm_calls
        for call in calls
        for vector in (call.channels, *call.parameters)
        if vector is not None
    ]
    others += [mixture.atoms for mixture in record.mixtures] + record.heads
    partly = [cut.vector for cut in record.cuts if not atoms[label[cut.vector]].all()]
    return bool(atoms[0]) or any(atoms[label[vector]].any() for vector in (*others, *partly))


def _chain(
    record: Record,
    shuffles: Sequence[tuple[Table, Table, int]],
    label: Vector,
    atoms: npt.NDArray[np.bool_],
) -> Chain | None:
    """What these shuffles do to the channels; None if that says nothing of other widths."""
    begins = np.zeros(label.size + 1, bool)
    for vector in _dimensions(record, shuffles):
        classes = label[vector]
        inside = np.flatnonzero(atoms[classes])
        if not inside.size:
            continue
        follows = np.ones(inside.size, bool)
        follows[0] = False
        follows[1:] = (np.diff(inside) == 1) & (np.diff(classes[inside]) == 1)
        begins[classes[inside[~follows]]] = True
        ends = np.append(np.flatnonzero(~follows)[1:], inside.size) - 1
        begins[classes[inside[ends]] + 1] = True
    members = np.flatnonzero(atoms)
    starts = np.ones(members.size, bool)
    starts[1:] = (np.diff(members) > 1) | begins[members[1:]]
    segments = np.split(members, np.flatnonzero(starts)[1:])
    number = np.zeros(label.size, np.int64)
    number[members] = np.cumsum(starts) - 1

    def of(vector: Vector) -> tuple[int, ...]:
        classes = label[vector]
        return tuple(number[classes[starts[np.searchsorted(members, classes)]]].tolist())

    turns = [
        Turn(of(first.cells), of(last.cells), tuple(a.size for a in first.axes), live)  # type: ignore[arg-type]
        for first, last, live in shuffles
    ]
    sizes = [segment.size for segment in segments]
    width = int(np.gcd.reduce([*sizes, *(turn.shape[turn.live] for turn in turns)]))
    return Chain(label, tuple(segments), width, tuple(turns)) if width > 1 else None


def _sizes(
    shuffles: Sequence[tuple[Table, Table, int]],
    label: Vector,
    atoms: npt.NDArray[np.bool_],
    counted: Sequence[Size],
) -> dict[tuple[str, str], Size] | None:
    """The attributes that say how long segments or axes of grids are, each with one vector that it
    counts: as all of a chain shrink in proportion, it counts the others too.

    Returns:
        None where one counts something else besides.
    """
    places: dict[int, Vector] = {}  # the first atom of an axis -> as many channels
    for first, _, live in shuffles:
        places[int(first.axes[live][0])] = first.cells[: first.axes[live].size]
    vectors: dict[tuple[str, str], list[Vector | None]] = {}
    for size in counted:
        vector = places.get(int(size.atoms[0]), size.atoms) if size.atoms.size else size.atoms
        inside = bool(vector.size) and bool(atoms[label[vector]].all())
        if not inside and atoms[label[vector]].any():
            return None
        found = vectors.setdefault((size.module, size.attribute), [])
        found.append(vector if inside else None)
    named = {}
    for key, found in vectors.items():
        mine = [vector for vector in found if vector is not None]
        if mine and len(mine) < len(found):
            return None
        if mine:
            named[key] = Size(*key, mine[0], weak=False)
    return named


def _dimensions(record: Record, shuffles: Sequence[tuple[Table, Table, int]]) -> Iterator[Vector]:
    """All vectors along which channels lie that a narrower network has too."""
    every = np.arange(record.count)
    for start, _, _, size in record.starts:
        yield every[start : start + size]
    for first, last, live in shuffles:
        yield from (first.cells, last.cells, first.cells[: first.axes[live].size])
    for cut in record.cuts:
        yield cut.vector
        yield from (cut.vector[start:stop] for start, stop in cut.parts)
    yield from (size.atoms for size in record.sizes)
