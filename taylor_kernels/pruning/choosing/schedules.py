"""How the groups of a stage of shuffles shrink in step: the widths that it goes through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Counts = npt.NDArray[np.int64]


class Schedule:
    """The widths that a stage goes through: to the least that it may have, as many as can be.

    Args:
        counts: [widths, kinds] int64, as of `Stage`: from one width to the next that it has, there
            must not be more channels of any kind.
        allowed: [widths] bool, those that it may have.

    Attributes:
        least: [kinds] int64, how many channels of each kind are left at the least width.
    """

    def __init__(self, counts: _Counts, allowed: npt.NDArray[np.bool_]) -> None:
        self._counts = counts
        usable = allowed & (counts >= 0).all(1) & (counts <= counts[-1]).all(1)
        # The way through most widths might end above the least one, and targets out of reach.
        self.least = counts[usable.argmax() if usable.any() else -1]
        self._next = _longest_ways(counts, usable & (counts >= self.least).all(1))

    def steps(
        self, alive: Sequence[int] | None = None, kinds: Sequence[int] | None = None
    ) -> _Counts:
        """How many channels of these kinds there are at the present width and at each that the
        stage then goes through: [steps, kinds].

        Args:
            alive: how many there are now of each; None at first.
            kinds: None for all.
        """
        counts = self._counts if kinds is None else self._counts[:, list(kinds)]
        if alive is None:
            return counts[self._way()]
        same = (counts == np.asarray(alive)).all(1) & (self._counts >= 0).all(1)
        if not same.any():
            return np.asarray(alive)[None]
        return counts[self._way(int(same.argmax()))]

    def has(self, alive: Sequence[int], kinds: Sequence[int]) -> bool:
        """Whether some width, allowed or not, has as many channels of these kinds."""
        return bool((self._counts[:, list(kinds)] == np.asarray(alive)).all(1).any())

    def _way(self, width: int = -1) -> list[int]:
        way = [width % len(self._counts)]
        while after := int(self._next[way[-1]]):
            way.append(after)
        return way


def _longest_ways(counts: _Counts, usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each width the next one on the way through most widths; 0 at its end.

    Args:
        usable: [widths] bool, those that a way may go through.
    """
    longest, after = np.zeros((2, len(counts)), np.int64)
    for width in range(1, len(counts)):
        narrower = usable[:width] & (counts[:width] <= counts[width]).all(1)
        if narrower.any():
            found = np.where(narrower, longest[:width], -1)[::-1]
            after[width] = width - 1 - found.argmax()
            longest[width] = longest[after[width]] + 1
    return after
