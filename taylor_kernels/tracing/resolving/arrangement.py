"""Where the channels of chains lie once some of them have gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.chains import Chain
from taylor_kernels.tracing.notes.record import Record

#: What a vector is made of.
_Pieces = tuple[tuple[int, int] | slice, ...]
#: Where the channels of a chain lie after so many removals is remembered.
_REMEMBERED = 8


class Stage:
    """A chain whose channels are known by their classes.

    Channels of one kind are made and read by the same layers. In a network of another width as many
    places of a kind as it has go to the channels of that kind that are left, in their order.

    Attributes:
        segments: the classes along each segment, at the width of the run.
        counts: [widths, kinds] int64, how many channels of each kind a network of a width has;
            -1 where it has channels of kinds that this one has not.
    """

    def __init__(self, chain: Chain, label: Vector) -> None:
        self._chain = chain
        self.segments = [label[segment] for segment in chain.segments]
        classes = np.concatenate(self.segments)
        self._known: dict[bytes, list[Vector]] = {}
        channels, kinds = self._ordered(chain.width)
        self._classes = classes[channels]
        self.kinds, numbers = np.unique(kinds, return_inverse=True)
        #: [classes of the chain] int64, the kind of each.
        self.kind_of = dict(zip(self._classes.tolist(), numbers.tolist(), strict=True))
        # Of a class that is there twice, which makes the stage unsound, the last one counts.
        self._numbers = np.array([self.kind_of[n] for n in self._classes.tolist()], np.int64)
        self.sound = len(self.kind_of) == len(channels) and np.array_equal(
            np.unique(classes), np.unique(self._classes)
        )
        self.counts = np.full((chain.width + 1, self.kinds.size), -1)
        for width in range(1, chain.width + 1):
            places = chain.channels(width)
            firsts = places == np.arange(places.size)
            of_width = chain.kinds(places, width)[firsts]
            place = np.minimum(np.searchsorted(self.kinds, of_width), self.kinds.size - 1)
            if (self.kinds[place] == of_width).all():
                self.counts[width] = np.bincount(place, minlength=self.kinds.size)

    def _ordered(self, width: int) -> tuple[Vector, npt.NDArray[np.uint64]]:
        """The first places of the channels at a width, kind by kind, and the kind of each."""
        places = self._chain.channels(width)
        channels = np.unique(places)
        kinds = self._chain.kinds(places, width)[channels]
        order = np.lexsort((channels, kinds))
        return channels[order], kinds[order]

    def left(self, gone: npt.NDArray[np.bool_]) -> list[Vector]:
        """The classes along each segment once these have gone.

        Args:
            gone: [classes] bool.

        Raises:
            ValueError: no network of this code has what is left.
        """
        stays = ~gone[self._classes]
        key = stays.tobytes()
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._arranged(gone, stays)
        return self._known[key]

    def _arranged(self, gone: npt.NDArray[np.bool_], stays: npt.NDArray[np.bool_]) -> list[Vector]:
        first = self.segments[0]
        width = np.count_nonzero(~gone[first]) * self._chain.width // first.size
        counts = np.bincount(self._numbers[stays], minlength=self.kinds.size)
        if not width or not np.array_equal(counts, self.counts[width]):
            raise ValueError(
                "dead: the channels that a chain of shuffles would be left with are those of no "
                "width that it can have; take units of its groups as `Group.stage` says"
            )
        channels, _ = self._ordered(width)
        of_channel = np.zeros(channels.max() + 1, np.int64)
        of_channel[channels] = self._classes[stays]
        every = of_channel[self._chain.channels(width)]
        return np.split(every, np.cumsum(self._chain.sizes(width))[:-1])


class Arrangement:
    """In which order what is left of vectors of classes lies.

    Args:
        stages: that may be rearranged.
        pieces: the bytes of a vector -> what it is made of: segments, (stage, its segment), and
            slices of it that are in no stage. Of others the order stays.
    """

    def __init__(self, stages: Sequence[Stage], pieces: Mapping[bytes, _Pieces]) -> None:
        self.stages = tuple(stages)
        self._pieces = pieces

    def moves(self, vector: Vector) -> bool:
        """Whether what is left of a vector, which is one of the whole model, may change places."""
        return vector.tobytes() in self._pieces

    def left(self, vector: Vector, gone: npt.NDArray[np.bool_]) -> Vector:
        """What is left of a vector, which is one of the whole model.

        Args:
            gone: [classes] bool.
        """
        pieces = self._pieces.get(vector.tobytes()) if self.stages else None
        if pieces is None:
            return vector[~gone[vector]]
        parts = []
        for piece in pieces:
            if isinstance(piece, slice):
                parts.append(vector[piece][~gone[vector[piece]]])
            else:
                stage, segment = piece
                parts.append(self.stages[stage].left(gone)[segment])
        return np.concatenate(parts)


def arranged(record: Record, label: Vector) -> Arrangement:
    """The arrangement of a run's chains.

    It has none where removal could not put channels in their places: a parameter has some of a
    segment, or two have the same channels in the same order at the width of the run, and not at
    others (as many residual shuffles as bring all channels back to their places).

    Args:
        label: atom -> class.
    """
    none = Arrangement((), {})
    stages = [Stage(chain, label) for chain in record.chains]
    if not stages or not all(stage.sound for stage in stages):
        return none
    every = np.arange(label.size)
    tensors = [every[start : start + size] for start, _, _, size in record.starts]
    layers = [vector for p in record.products for vector in (p.inputs, p.outputs)]
    others = [norm.atoms for norm in record.norms]
    others += [vector for step in record.steps for vector in (step.inputs, step.outputs)]
    cutter = _Cutter(record.chains)
    found: dict[bytes, _Pieces] = {}
    for number, atoms in enumerate((*tensors, *layers, *others)):
        pieces = cutter.pieces(atoms)
        if pieces is None and number < len(tensors):
            return none
        if pieces and found.setdefault(label[atoms].tobytes(), pieces) != pieces:
            return none
    return Arrangement(stages, found)


def places_in(vector: Vector, wanted: Vector) -> Vector:
    """Where in a vector the classes of another order of it are; of one that is in it several times
    the first comes before the second in both."""
    places = np.empty(vector.size, np.int64)
    places[np.argsort(wanted, kind="stable")] = np.argsort(vector, kind="stable")
    return places


class _Cutter:
    """Cuts vectors of atoms into segments of chains."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._joined = chains[0].joined
        self._segments = {
            int(segment[0]): ((number, place), segment)
            for number, chain in enumerate(chains)
            for place, segment in enumerate(chain.segments)
        }
        self._inside = np.zeros(self._joined.size, bool)
        for _, segment in self._segments.values():
            self._inside[segment] = True

    def pieces(self, atoms: Vector) -> _Pieces | None:
        """What a vector is made of, () if nothing of it is in a chain; None where it has some of a
        segment, and not all."""
        classes = self._joined[atoms]
        inside = self._inside[classes]
        if not inside.any():
            return ()
        ends = np.append(np.flatnonzero(np.diff(inside)) + 1, atoms.size).tolist()
        found: list[tuple[int, int] | slice] = []
        place = 0
        while place < atoms.size:
            if not inside[place]:
                end = next(end for end in ends if end > place)
                found.append(slice(place, end))
            else:
                name, segment = self._segments.get(int(classes[place]), (None, classes[:0]))
                end = place + segment.size
                if name is None or not np.array_equal(classes[place:end], segment):
                    return None
                found.append(name)
            place = end
        return tuple(found)
