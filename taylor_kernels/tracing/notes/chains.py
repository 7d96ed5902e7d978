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

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.forest import Forest


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
