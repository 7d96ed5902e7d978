"""Chains of shuffles and halves, whose channels may change places as some of them go.

In a stage of ShuffleNetV2 every block leaves one half of its channels as it is, makes the other
half anew and shuffles both. Channel k of the first half lies at 2k behind the shuffle, so what is
left once some have gone would be read by other blocks than before: in its order a stage of eight
blocks loses 128 channels at once or none. But in which order channels lie within the stage nothing
sees. All that counts is which layers make a channel and read it: channels with the same makers and
readers are of one kind, and any of them can lie wherever a narrower network has one of that kind.
So a stage can be as wide as any network of the same code that has of no kind more than there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taylor_kernels.tracing.forest import Forest
from taylor_kernels.tracing.record import Join, Record, Table, Vector


@dataclass(frozen=True)
class Turn:
    """A shuffle: a grid that is made of some segments, transposed, and cut into others.

    Attributes:
        before, after: the numbers of the segments along the dimension before it and behind.
        shape: of the grid before it.
        live: the dimension of the grid that shrinks.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    shape: tuple[int, int]
    live: int


@dataclass(frozen=True, eq=False)
class Chain:
    """What shuffles do to the channels of a stage, at any width.

    Attributes:
        joined: for each atom of the run the one that it goes by, whatever shuffles do.
        segments: of these the ones that always lie side by side, at the width of the run.
        width: of the run: the greatest number that all segments are multiples of.
        turns: the shuffles.
    """

    joined: Vector
    segments: tuple[Vector, ...]
    width: int
    turns: tuple[Turn, ...]

    @cached_property
    def _shares(self) -> Vector:
        return np.array([segment.size // self.width for segment in self.segments])

    def sizes(self, width: int) -> Vector:
        """How long the segments are at a width."""
        return self._shares * width

    def channels(self, width: int) -> Vector:
        """The channel at each place of all segments, one after the other, at a width; a channel
        goes by one of its places, of the same segment at all widths."""
        sizes = self.sizes(width)
        ends = np.cumsum(sizes).tolist()
        every = np.arange(ends[-1])
        places = [every[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
        turned = []
        for turn in self.turns:
            shape = list(turn.shape)
            shape[turn.live] = shape[turn.live] * width // self.width
            before = np.concatenate([places[number] for number in turn.before])
            after = np.concatenate([places[number] for number in turn.after])
            turned.append((before.reshape(shape).T.ravel(), after))
        if not self._in_order:
            forest = Forest(every.size)
            forest.unite(turned)
            return forest.label
        for before, after in turned:
            every[after] = every[before]
        return every

    @cached_property
    def _in_order(self) -> bool:
        """Whether each shuffle makes segments that none before it has to do with."""
        known: set[int] = set()
        for turn in self.turns:
            if len(set(turn.after)) < len(turn.after) or not known.isdisjoint(turn.after):
                return False
            known.update(turn.before, turn.after)
        return True

    def kinds(self, channels: Vector, width: int) -> npt.NDArray[np.uint64]:
        """A number for the kind of the channel at each place: for the segments it goes through.

        Args:
            channels: what `channels` says of that width.
        """
        sums = np.zeros(channels.size, np.uint64)
        np.add.at(sums, channels, np.repeat(self._draw, self.sizes(width)))
        return sums[channels]

    @cached_property
    def _draw(self) -> npt.NDArray[np.uint64]:
        """A random number for each segment: a kind is a multiset of segments, and sums of these
        tell kinds apart."""
        return np.random.default_rng(0).integers(1, 2**63, len(self.segments), np.uint64)


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
    uses = np.zeros(record.count, np.int64)
    for vector in _of_axes(record):
        uses[np.unique(vector)] += 1
    uses[list(record.seen)] += 3
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


def with_chains(record: Record, shuffles: Sequence[_Shuffle], label: Vector) -> Record | None:
    """The record where the channels of chains go one by one, and may change places.

    Args:
        shuffles: of `find_shuffles`.
        label: for each atom the one that it goes by, after all that has met.

    Returns:
        None where there are no chains.
    """
    chains = []
    tables: set[int] = set()
    joins: list[Join] = []
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
        chain = _chain(record, mine, label, atoms)
        if chain is None:
            continue
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
        chains=chains,
    )


def _of_axes(record: Record) -> Iterator[Vector]:
    """Everything that says something of atoms and may speak of the axes of a grid."""
    for join in record.joins:
        yield from (join.one, join.other)
    for table in record.tables:
        yield from (table.cells, *table.axes)
    yield from (vector for vector, _ in record.fixed)
    yield from (cut.vector for cut in record.cuts)
    yield from (size.atoms for size in record.sizes)
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


def _dimensions(record: Record, shuffles: Sequence[tuple[Table, Table, int]]) -> Iterator[Vector]:
    """All vectors along which channels lie that a narrower network has too."""
    every = np.arange(record.count)
    for start, _, _, size in record.starts:
        yield every[start : start + size]
    for first, last, _ in shuffles:
        yield from (first.cells, last.cells)
    for cut in record.cuts:
        yield cut.vector
        yield from (cut.vector[start:stop] for start, stop in cut.parts)
    yield from (size.atoms for size in record.sizes)
