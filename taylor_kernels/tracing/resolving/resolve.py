"""From what a run wrote down to classes of atoms that go together, and why the others stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from taylor_kernels.tracing.notes.across import Across, accepted, mixing
from taylor_kernels.tracing.notes.atoms import MEETS_FIXED, Reason, Vector
from taylor_kernels.tracing.notes.entries import Size, Table
from taylor_kernels.tracing.notes.forest import Forest
from taylor_kernels.tracing.notes.norm_calls import CalledNorms, accepted_calls
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.resolving.choosing import Chooser, Resolution
from taylor_kernels.tracing.resolving.cuts import proportional, with_sizes_of_others
from taylor_kernels.tracing.resolving.find_chains import find_shuffles, with_chains
from taylor_kernels.tracing.resolving.grids import FREE, Grids, grids_of

_ROUNDS = 8
#: So many atoms of joins are united as soon one by one.
_FEW = 2**13


@dataclass(frozen=True)
class Resolved:
    """What a run says about classes.

    Attributes:
        resolution: the classes.
        across: the norms across channels that keep nothing.
        called: those that are functions, by the module whose code calls them.
        record: that says so: the given one, or one that knows more of its cuts.
    """

    resolution: Resolution
    across: list[Across]
    called: dict[str, CalledNorms]
    record: Record


def resolve(record: Record) -> Resolved:
    """Work out the classes."""
    forest = Forest(record.count)
    lone = _join(record, forest)
    # One attribute counts the same number wherever it is used.
    firsts: dict[tuple[str, str], Size] = {}
    pairs = []
    sides = _Sides(record.tables, forest.label)
    for size in counted(record.sizes, forest.label):
        first = firsts.setdefault((size.module, size.attribute), size)
        if sides.cross(first.atoms, size.atoms):
            continue
        both = (first.atoms != 0) & (size.atoms != 0)
        pairs.append((first.atoms[both], size.atoms[both]))
    forest.unite(pairs)
    grids = grids_of(record.tables)
    _close(record.tables, grids, forest)
    across = accepted(record.across, record.fixed, forest.label)
    lifted = {n for call in across for n in mixing(call, record.fixed, forest.label)}
    called = accepted_calls(
        record.norm_calls, record.fixed, forest.label, {call.module for call in across}
    )
    lifted = lifted.union(*(each.lifted for each in called.values()))
    routed = {number for mixture in record.mixtures for number in mixture.lifted}
    fixed = [
        (number, 1, vector, reason)
        for number, (vector, reason) in enumerate(record.fixed)
        if number not in routed and number not in lifted
    ]
    # In running order: the first reason of several is the one that is given.
    ordered = sorted([*lone, *fixed], key=lambda entry: entry[:2])
    reasons = [Reason("is no parameter's"), *(reason for *_, reason in ordered)]
    why = np.full(record.count, FREE)
    why[0] = 0
    if ordered:
        sizes = [vector.size for _, _, vector, _ in ordered]
        numbers = np.repeat(np.arange(1, len(ordered) + 1), sizes)
        np.minimum.at(why, np.concatenate([vector for _, _, vector, _ in ordered]), numbers)
    by_class = np.full(record.count, FREE)
    np.minimum.at(by_class, forest.label, why)
    if other := with_sizes_of_others(record, by_class[forest.label] != FREE):
        return resolve(other)
    return Resolved(_chosen(record, grids, forest, why, reasons), across, called, record)


def one_by_one(record: Record) -> Record | None:
    """The record where channels that shuffles couple go one by one, as long as what is left may
    change places; None where there are none."""
    shuffles = find_shuffles(record)
    if not shuffles:
        return None
    forest = Forest(record.count)
    _join(record, forest)
    return with_chains(record, shuffles, forest.label, counted(record.sizes, forest.label))


def _chosen(
    record: Record, grids: Sequence[Grids], forest: Forest, why: Vector, reasons: list[Reason]
) -> Resolution:
    """Choose the axes along which tables shrink, among classes numbered without gaps.

    Every choice that is tried goes through all numbers several times, and of atoms there are many
    more than of classes.
    """
    parts = proportional(record)
    label = forest.label.copy()
    if (fixed := np.flatnonzero(label == 0)[1:]).size:
        # Number 0 is for places that have no atoms; these have, and cannot go either.
        label[fixed], why[fixed] = fixed[0], 0
    firsts = np.flatnonzero(label == np.arange(record.count))
    number = np.zeros(record.count, np.int64)
    number[firsts] = np.arange(firsts.size)
    number = number[label]
    by_class = np.full(firsts.size, FREE)
    np.minimum.at(by_class, number, why)
    small = replace(
        record,
        count=firsts.size,
        tables=[
            replace(t, cells=number[t.cells], axes=tuple(number[axis] for axis in t.axes))
            for t in record.tables
        ],
        sizes=[replace(size, atoms=number[size.atoms]) for size in record.sizes],
        fixed=[(number[vector], reason) for vector, reason in record.fixed],
        heads=[number[vector] for vector in record.heads],
        products=[replace(p, outputs=number[p.outputs]) for p in record.products],
        seen=set(number[list(record.seen)].tolist()),
    )
    chooser = Chooser(
        small,
        [Grids(number[grid.cells], number[grid.axes]) for grid in grids],
        [replace(part, vector=number[part.vector]) for part in parts],
        by_class,
        reasons,
    )
    chosen = chooser.resolution()
    return replace(chosen, label=firsts[chosen.label][number], why=chosen.why[number])


def _join(record: Record, forest: Forest) -> list[tuple[int, int, Vector, Reason]]:
    """Unite what met, and what met nothing with its reason, by place in running order."""
    joins = [join for join in record.joins if join.one.size]
    if not joins:
        return []
    one = np.concatenate([join.one for join in joins])
    other = np.concatenate([join.other for join in joins])
    sizes = np.array([join.one.size for join in joins])
    begin = np.cumsum(sizes) - sizes
    follows = np.ones(one.size, bool)
    follows[1:] = (np.diff(one) == 1) & (np.diff(other) == 1)
    follows[begin] = (one[begin] != 0) & (other[begin] != 0)
    run = np.logical_and.reduceat(follows, begin) & (one.size > _FEW)
    if run.any():
        forest.unite_runs(one[begin[run]], other[begin[run]], sizes[run])
    both = (one != 0) & (other != 0) & ~np.repeat(run, sizes)
    forest.unite([(one[both], other[both])])
    lone = np.flatnonzero((one == 0) != (other == 0))
    number = np.repeat(np.arange(len(joins)), sizes)[lone]
    atoms = np.maximum(one, other)[lone]
    begins = np.flatnonzero(np.diff(number, prepend=-1))
    found = []
    for at, vector in (
        zip(number[begins].tolist(), np.split(atoms, begins[1:]), strict=True)
        if begins.size
        else ()
    ):
        join = joins[at]
        found.append((join.after, 0, vector, record.reason(MEETS_FIXED, join.where)))
    return found


def counted(sizes: Sequence[Size], label: Vector) -> list[Size]:
    """What attributes count, without weak evidence where there is better or where it disagrees.

    Args:
        label: atom -> class.
    """
    strong = {(size.module, size.attribute) for size in sizes if not size.weak}
    differ = ambiguous(sizes, label)
    kept = []
    for size in sizes:
        key = (size.module, size.attribute)
        if not size.weak or (key not in strong and key not in differ):
            kept.append(size)
    return kept


def ambiguous(sizes: Sequence[Size], label: Vector) -> set[tuple[str, str]]:
    """The attributes, (module, name), of which weak evidence disagrees."""
    first: dict[tuple[str, str], Vector] = {}
    differ = set()
    for size in sizes:
        key = (size.module, size.attribute)
        if size.weak:
            classes = label[size.atoms]
            if not np.array_equal(first.setdefault(key, classes), classes):
                differ.add(key)
    return differ


class _Sides:
    """Tells whether channels lie along different axes of one table.

    How many heads there are and how many of a head's dimensions are rotated may be one number by
    chance, and an attribute that holds it is met at both.
    """

    def __init__(self, tables: Sequence[Table], label: Vector) -> None:
        self._tables, self._label = tables, label
        self._axes: dict[int, dict[int, int]] = {}

    def cross(self, one: Vector, other: Vector) -> bool:
        """Whether a table has some of one along an axis, and some of the other along another."""
        mine, theirs = self._label[one], self._label[other]
        if np.array_equal(mine, theirs):
            return False
        if not self._axes:
            for number, table in enumerate(self._tables):
                for dim, axis in enumerate(table.axes):
                    for atom in self._label[axis].tolist():
                        if atom:
                            self._axes.setdefault(atom, {})[number] = dim
            for table in self._tables:
                # What an axis is cut into lies along that axis.
                around = self._places(self._label[table.cells[:1]])
                for atom in self._label[np.concatenate(table.axes)].tolist():
                    if atom:
                        self._axes[atom] = around | self._axes[atom]
        places = self._places(mine)
        return any(places.get(number, dim) != dim for number, dim in self._places(theirs).items())

    def _places(self, atoms: Vector) -> dict[int, int]:
        found: dict[int, int] = {}
        for atom in atoms.tolist():
            found |= self._axes.get(atom, {})
        return found


def _close(tables: Sequence[Table], grids: Sequence[Grids], forest: Forest) -> None:
    """Cells with the same axes are one; axes of the same cells are one."""
    for _ in range(_ROUNDS):
        pairs: list[tuple[Vector, Vector]] = []
        seen: dict[tuple, Table] = {}
        for table in tables:
            shape = tuple(axis.size for axis in table.axes)
            other = seen.setdefault((shape, forest.label[table.cells].tobytes()), table)
            if other is not table:
                # Rows of groups go in equal numbers, which says nothing about their places.
                both = slice(1 if "rows" in (table.kind, other.kind) else None)
                pairs.extend(zip(table.axes[both], other.axes[both], strict=True))
        for grid in grids:
            keys, order = _sorted(forest.label[grid.axes], forest.label.size)
            keys, cells = keys[:, order], grid.cells[order]
            same = (keys[:, 1:] == keys[:, :-1]).all(axis=0)
            same &= (cells[1:] != 0) & (cells[:-1] != 0)
            pairs.append((cells[1:][same], cells[:-1][same]))
        if not forest.unite(pairs):
            return


def _sorted(axes: Vector, count: int) -> tuple[Vector, Vector]:
    """Each column in ascending order, and an order that puts the same ones beside each other.

    Args:
        axes: [axes, n] numbers below `count`.
    """
    if len(axes) == 2:  # the most frequent, for which np.sort is slow
        axes = np.stack([np.minimum(*axes), np.maximum(*axes)])
    else:
        axes = np.sort(axes, axis=0)
    if count ** len(axes) >= 2**63:
        return axes, np.lexsort(axes)
    return axes, np.argsort(reduce(lambda key, axis: key * count + axis, axes), kind="stable")
