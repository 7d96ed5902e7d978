"""Parts sliced off a dimension: what has to go together so that they stay in proportion.

Where code cuts a dimension in halves, quarters or thirds it works out the places from the width, so
each part must lose its share. Which channel of one part goes with which of another is open: classes
that are in proportion already need nothing, the others are matched in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.entries import Cut, Join
from taylor_kernels.tracing.notes.record import Record


@dataclass(frozen=True)
class Parts:
    """A dimension and the bounds at which it was cut.

    Attributes:
        short: the last part may lose fewer than the others, as long as it is not longer than they.
    """

    vector: Vector
    bounds: tuple[int, ...]
    reason: Reason
    short: bool = False


def proportional(record: Record) -> list[Parts]:
    """The cuts whose parts have to stay in proportion, in running order."""
    sources: dict[tuple[int, int], list[Cut]] = {}
    for cut in record.cuts:
        sources.setdefault(cut.source, []).append(cut)
    found = []
    starts = np.array([start for start, *_ in record.starts])
    for cuts in sources.values():
        vector = cuts[0].vector
        ends = {end for cut in cuts for part in cut.parts for end in part}
        bounds = tuple(sorted({0, vector.size, *ends}))
        sizes = set(np.diff(bounds).tolist())
        equal = any(cut.equal for cut in cuts)
        if len(sizes) > 1 and not equal:
            # Sizes in attributes follow, and so do those of what was put side by side.
            inner = np.array(bounds[1:-1])
            origin = np.searchsorted(starts, [vector[inner - 1], vector[inner]], "right")
            if all(cut.tied for cut in cuts) or (origin[0] != origin[1]).all():
                continue
        module, operation = cuts[0].where
        place = f"{operation} in {module!r}" if module else operation
        reason = Reason(f"is cut at a place that would move ({place})", module, operation)
        short = all(cut.short and len(cut.parts) == len(bounds) - 1 for cut in cuts)
        found.append(Parts(vector, bounds, reason, short))
    return found


def with_sizes_of_others(record: Record, kept: Vector) -> Record | None:
    """The record where parts that no proportion can hold have the sizes of other tensors.

    FocalNet's layer makes two streams and a map for each of its levels: the streams are as wide as
    the module's input and lose the same channels, and the maps stay.

    Args:
        kept: [atoms] bool, those that cannot go whatever becomes of the cuts.

    Returns:
        None where there are no such parts.
    """
    joins, fixed, sizes = list(record.joins), list(record.fixed), list(record.sizes)
    cuts = list(record.cuts)
    sources: dict[tuple[int, int], list[int]] = {}
    for number, cut in enumerate(cuts):
        if cut.others:
            sources.setdefault(cut.source, []).append(number)
    for numbers in sources.values():
        together = [cuts[number] for number in numbers]
        others, vector = _by_part(together), together[0].vector
        parts = [vector[start:stop] for start, stop in others]
        widths = [part.size for part in parts]
        hopeless = any(kept[part].all() for part in parts) or np.gcd.reduce(widths or [2]) == 1
        known = any(other is not None and other.size for other in others.values())
        if all(cut.tied for cut in together) or not hopeless or not known:
            continue
        for number, cut in zip(numbers, together, strict=True):
            cuts[number] = replace(cut, tied=True)
            sizes += cut.sizes
        where = together[0].where
        reason = record.reason("is one of a constant number of channels", where)
        for part, other in zip(parts, others.values(), strict=True):
            if other is None:
                fixed.append((part, reason))
            elif other.size and not np.array_equal(other, part):
                joins.append(Join(part, other, where, len(record.fixed)))
    if all(new is old for new, old in zip(cuts, record.cuts, strict=True)):
        return None
    return replace(record, joins=joins, fixed=fixed, sizes=sizes, cuts=cuts)


def _by_part(cuts: Sequence[Cut]) -> dict[tuple[int, int], Vector | None]:
    """What each part may be as wide as, in the order of the parts.

    Args:
        cuts: of one tensor: a split into parts, or slices.

    Returns:
        Nothing where the parts are not all of the tensor, or lie across each other.
    """
    found: dict[tuple[int, int], Vector | None] = {}
    for cut in cuts:
        for part, other in zip(cut.parts, cut.others, strict=True):
            if found.get(part) is None:
                found[part] = other
    ends = [0, *(stop for _, stop in sorted(found))]
    if [start for start, _ in sorted(found)] != ends[:-1] or ends[-1] != cuts[0].vector.size:
        return {}
    return {part: found[part] for part in sorted(found)}


#: What was asked of parts: their number, how much shorter the last is, and rows.
Asked = tuple[int, int, bytes]
#: Rows that make one another up: how many there are in each set, set after set, and what is left.
Sets = tuple[Vector, Vector, Vector]
#: Classes that are one, pair by pair, and those that find no match.
Matched = tuple[Vector, Vector, Vector]


def match(parts: Parts, chosen: Vector, label: Vector, known: dict[Asked, Sets]) -> Matched:
    """Classes that together are in proportion.

    Args:
        chosen: [n] bool, places of the dimension whose atoms can go.
        label: the classes of these.
        known: what was found for other parts: blocks of a network that are alike ask the same, and
            so does every choice of axes that is tried.
    """
    sizes = np.diff(parts.bounds)
    ratio = np.ones_like(sizes) if parts.short else sizes // np.gcd.reduce(sizes)
    part = np.repeat(np.arange(sizes.size), sizes)
    none = parts.vector[:0]
    if not label.size:
        return none, none, none
    classes, first, inverse = _different(label)
    counts = np.zeros((classes.size, sizes.size), np.int64)
    np.add.at(counts, (inverse, part[chosen]), 1)
    # In proportion, each part lost the same multiple of its ratio; in whole numbers.
    shares = counts * (np.lcm.reduce(ratio) // ratio)
    open_ = np.flatnonzero((shares != shares[:, :1]).any(axis=1))
    if not open_.size:
        return none, none, none
    order = open_[np.argsort(first[open_])]
    open_shares = shares[order]
    spare = int(sizes[0] - sizes[-1]) if parts.short else 0
    key = sizes.size, spare, open_shares.tobytes()
    if (found := known.get(key)) is None:
        sets, others = _together(open_shares)
        if spare:
            more, others = _with_a_short_one(open_shares, others, spare)
            sets += more
        sizes_of = np.array([len(members) for members in sets], np.int64)
        rows = np.fromiter(chain.from_iterable(sets), np.int64)
        found = known[key] = sizes_of, rows, np.array(others, np.int64)
    sizes_of, rows, left = found
    if sizes_of.size == 1 and rows.size == classes.size:
        return none, none, classes  # all or nothing
    firsts = rows[np.cumsum(sizes_of) - sizes_of]
    return (
        classes[order[np.repeat(firsts, sizes_of)]], classes[order[rows]], classes[order[left]]
    )  # fmt: skip


def _with_a_short_one(
    shares: Vector, rows: Sequence[int], spare: int
) -> tuple[list[list[int]], list[int]]:
    """Sets of these rows that take as much from all parts but the last, and no more from that, and
    the rows that are left.

    `chunk` gives all parts but the last the same size, rounded up: the last is shorter by fewer
    places than there are parts, and stays so where it comes nearer to the others.

    Args:
        spare: by so many places it is shorter.
    """
    left = np.array(rows, np.int64)
    found: list[list[int]] = []
    for members in _together(shares[left, :-1])[0] if rows else ():
        total = shares[left[members]].sum(axis=0)
        nearer = int(total[0] - total[-1])
        if 0 <= nearer <= spare:
            spare -= nearer
            found.append(left[members].tolist())
    return found, sorted(set(rows) - set(chain.from_iterable(found)))


def _different(label: Vector) -> tuple[Vector, Vector, Vector]:
    """The classes of a vector in ascending order, the first place of each, and for each place which
    of them it has.

    A table of positions has thousands of places, which are not sorted for that.
    """
    span = int(label.max()) + 1
    if span > 4 * label.size:
        classes, first, inverse = np.unique(label, return_index=True, return_inverse=True)
        return classes, first, inverse.ravel()
    places = np.full(span, label.size)
    places[label[::-1]] = np.arange(label.size)[::-1]  # of several the first is written last
    classes = np.flatnonzero(places < label.size)
    number = np.empty(span, np.int64)
    number[classes] = np.arange(classes.size)
    return classes, places[classes], number[label]


def _together(shares: Vector) -> tuple[list[list[int]], list[int]]:
    """Sets of rows whose sums are the same in every column, and the rows that are left.

    A set takes the row that leaves the least to make up for, until nothing is left to.
    """
    kinds, kind = np.unique(shares, axis=0, return_inverse=True)
    order = np.argsort(kind.ravel(), kind="stable")
    bounds = np.cumsum(np.bincount(kind.ravel(), minlength=len(kinds)))
    waiting = [rows.tolist() for rows in np.split(order, bounds[:-1])]
    taken = np.zeros(len(kinds), np.int64)
    counts = np.array([len(rows) for rows in waiting])
    # Rows of several columns come first: the others can make up for them.
    mixed = (kinds != 0).sum(axis=1) > 1
    sets: list[list[int]] = []
    while (left := np.flatnonzero(counts > taken)).size:
        heads = {k: waiting[k][taken[k]] for k in left.tolist()}
        start = min(heads, key=lambda k: (not mixed[k], heads[k]))
        if ((counts - taken) @ kinds).min() < kinds[start].max():
            break  # in some column all that is left is too little
        need = np.zeros(len(kinds), np.int64)
        need[start] = 1
        total = kinds[start].copy()
        while total.min() != total.max():
            open_ = np.flatnonzero(counts > taken + need)
            if not open_.size:
                break
            sums = total + kinds[open_]
            missing = ((sums.max(axis=1, keepdims=True) - sums) ** 2).sum(axis=1)
            best = open_[missing == missing.min()].tolist()
            pick = min(best, key=lambda k: waiting[k][taken[k] + need[k]])
            need[pick] += 1
            total += kinds[pick]
        if total.min() != total.max():
            break
        used = np.flatnonzero(need)
        for _ in range(int(((counts - taken)[used] // need[used]).min())):
            sets.append([row for k in used for row in waiting[k][taken[k] : taken[k] + need[k]]])
            taken += need
    return sets, [row for k, rows in enumerate(waiting) for row in rows[taken[k] :]]
