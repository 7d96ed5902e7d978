"""Units of channels: which indices of which tensors go together, in groups of the same make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.resolving.arrangement import Stage

OUT, IN = "out", "in"


@dataclass(frozen=True)
class Slot:
    """One side of a layer that the units of a group run through.

    Attributes:
        owner: the layer's module name.
        side: OUT for output channels, IN for input channels, as the layer counts them (over all
            groups of a grouped convolution).
        index: [U, m] int64, the m channels of each unit, ascending.
    """

    owner: str
    side: str
    index: Tensor


@dataclass(frozen=True)
class Entry:
    """The indices [U, m] int64 along `dim` of a parameter or buffer, one row per unit.

    Attributes:
        fill: what a masked entry holds.
    """

    tensor: str
    dim: int
    index: Tensor
    fill: float = 0.0


@dataclass(frozen=True)
class Group:
    """Units of one make, any of which can go as long as one stays.

    Attributes:
        slots: the layers that it runs through.
        entries: everything that goes with a unit.
        classes: [U] int64, each unit's number in `Channels.classes`.
        norms: names of the modules that normalise these channels one by one, in the order in
            which they run.
        stage: a chain of shuffles that these are channels of, all of one kind: units of all of its
            groups go in step, so many of each as `Stage.counts` says of narrower networks.
        kind: the column of these units in the counts of the stage.
    """

    slots: tuple[Slot, ...]
    entries: tuple[Entry, ...]
    classes: Tensor
    norms: tuple[str, ...]
    stage: Stage | None = None
    kind: int = 0

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.classes.numel()

    @property
    def producers(self) -> list[Slot]:
        """The layers whose output channels these are."""
        return [slot for slot in self.slots if slot.side == OUT]

    @property
    def name(self) -> str:
        """The layer that names the group in messages; "" once all of its layers have gone."""
        return self.producers[0].owner if self.producers else ""

    def without(self, dead: Tensor, moved: Mapping[tuple[str, str | int], Vector]) -> Group:
        """The group once its dead units ([U] bool) are removed.

        Args:
            moved: (layer, side) or (tensor, dimension) -> for each of its places the new one.
        """

        def closed_up(rows: Tensor, owner: str, place: str | int) -> Tensor:
            return index(moved[owner, place][rows[~dead].numpy()])

        slots = [replace(s, index=closed_up(s.index, s.owner, s.side)) for s in self.slots]
        entries = [replace(e, index=closed_up(e.index, e.tensor, e.dim)) for e in self.entries]
        return replace(
            self, slots=tuple(slots), entries=tuple(entries), classes=self.classes[~dead]
        )


#: A key of a place list, and the class of each of its places.
Place = tuple[tuple[str, str | int], Vector]


def collect(
    places: Sequence[Place], free: Vector
) -> list[tuple[Tensor, dict[tuple[str, str | int], Tensor]]]:
    """Units of the same make.

    Args:
        places: lists of places; the first ones order the units.
        free: [classes] bool, classes that can go.

    Returns:
        For each make its classes [U], and by key the places [U, m] of each unit.
    """
    # Most lists are the same as some others: a filter's, its bias's, those of the norm behind it.
    numbers_of: dict[bytes, list[int]] = {}
    for number, (_, vector) in enumerate(places):
        numbers_of.setdefault(vector.tobytes(), []).append(number)
    lists = list(numbers_of.values())
    firsts_of = [places[numbers[0]][1] for numbers in lists]
    sizes = np.array([vector.size for vector in firsts_of])
    unit = np.concatenate(firsts_of)
    chosen = np.flatnonzero(free[unit])
    if not chosen.size:
        return []
    ends = np.cumsum(sizes)
    owner = np.repeat(np.arange(len(lists)), sizes)[chosen]
    where = chosen - (ends - sizes)[owner]
    unit = unit[chosen]
    # A make is a multiset of lists: sums of random 64-bit numbers tell makes apart.
    draw = np.random.default_rng(0).integers(1, 2**63, len(lists), np.uint64)
    sums = np.zeros(free.size, np.uint64)
    np.add.at(sums, unit, draw[owner])
    # Units are in the order of their first places.
    first = np.full(free.size, owner.size)
    first[unit[::-1]] = np.arange(owner.size)[::-1]
    present = np.flatnonzero(first < owner.size)
    _, kinds = np.unique(sums[present], return_inverse=True)
    order = np.lexsort((first[present], kinds.ravel()))
    present, kinds = present[order], kinds.ravel()[order]
    begins = np.flatnonzero(np.diff(kinds, prepend=-1))
    rank, make = np.zeros(free.size, np.int64), np.zeros(free.size, np.int64)
    rank[present], make[present] = np.arange(present.size), kinds
    # Places are sorted by list already, and within a unit by their number.
    makes = make[unit]
    order = np.argsort((makes * len(lists) + owner) * present.size + rank[unit], kind="stable")
    owner, makes = owner[order], makes[order]
    begin = np.diff(makes, prepend=-1) != 0
    begin[1:] |= np.diff(owner) != 0
    starts = np.flatnonzero(begin)
    members = _pieces(present, begins)
    found: list[list[tuple[int, Tensor]]] = [[] for _ in members]
    for kind, which, rows in zip(
        makes[starts].tolist(), owner[starts].tolist(), _pieces(where[order], starts), strict=True
    ):
        own = rows.view(members[kind].numel(), -1)
        found[kind] += [(number, own) for number in lists[which]]
    tables = [
        {places[number][0]: rows for number, rows in sorted(own, key=itemgetter(0))}
        for own in found
    ]
    firsts = first[present[begins]].tolist()
    numbers = sorted(range(len(members)), key=firsts.__getitem__)
    return [(members[number], tables[number]) for number in numbers]


def _pieces(values: Vector, starts: Vector) -> tuple[Tensor, ...]:
    """A vector split at these places."""
    sizes = np.diff(starts, append=values.size).tolist()
    return torch.from_numpy(values).split(sizes)


def in_step(groups: Sequence[Group], stages: Sequence[Stage]) -> list[Group]:
    """The groups, those of chains with what says how they go in step; without those of chains of
    which some channels are in no group, or some of a group of another kind."""
    found = list(groups)
    for stage in stages:
        kinds: dict[int, set[int]] = {}
        for number, group in enumerate(found):
            mine = {stage.kind_of.get(n, -1) for n in group.classes.tolist()}
            if mine != {-1}:
                kinds[number] = mine
        held = sum(found[number].size for number in kinds)
        sound = (
            held == len(stage.kind_of)
            and all(len(mine) == 1 for mine in kinds.values())
            and len(kinds) == stage.kinds.size
        )
        found = [
            replace(group, stage=stage, kind=kinds[number].pop()) if number in kinds else group
            for number, group in enumerate(found)
            if sound or number not in kinds
        ]
    return found


def index(values: Vector) -> Tensor:
    """A vector as a tensor with memory in a row."""
    return torch.from_numpy(np.ascontiguousarray(values))
