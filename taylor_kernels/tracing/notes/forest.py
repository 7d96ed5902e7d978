"""Union-find over atoms, a batch of unions at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from taylor_kernels.tracing.notes.atoms import Vector


class Forest:
    """Which atoms are one.

    Attributes:
        label: for each atom the least atom that it is one with.
    """

    def __init__(self, count: int) -> None:
        self.label: Vector = np.arange(count, dtype=np.int64)

    def copy(self) -> Forest:
        other = Forest(0)
        other.label = self.label.copy()
        return other

    def unite(self, pairs: Iterable[tuple[Vector, Vector]]) -> bool:
        """Make the atoms of each pair of vectors one, place by place; whether any were two."""
        pairs = list(pairs)
        if not pairs:
            return False
        one, other = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
        low, high = self.label[one], self.label[other]
        apart = low != high
        if not apart.any():
            return False
        low, high = low[apart], high[apart]
        # Only the classes that meet are worked on; the others keep their labels.
        met = np.zeros(self.label.size, bool)
        met[low] = met[high] = True
        classes = np.flatnonzero(met)
        place = np.empty(self.label.size, np.int64)
        place[classes] = np.arange(classes.size)
        joined = _least(place[low], place[high], classes.size)
        least = np.arange(self.label.size)
        least[classes] = classes[joined]
        self.label = least[self.label]
        return True

    def unite_runs(self, one: Vector, other: Vector, sizes: Vector) -> None:
        """Make one of each two runs of atoms, place by place, as long as no two atoms are.

        Most of what a model joins are whole dimensions of parameters: there are hundreds of them,
        and of atoms hundreds of thousands.

        Args:
            one, other: [runs], the first atom of each run.
            sizes: [runs], how many atoms follow each other.
        """
        wide = int(sizes.max(initial=0)) + 1
        ends = np.concatenate([one, other]) * wide + np.concatenate([sizes, sizes])
        runs, place = np.unique(ends, return_inverse=True)  # by their first atom
        first, size = np.divmod(runs, wide)
        apart = np.ones(runs.size, bool)
        apart[1:] = first[1:] >= np.maximum.accumulate(first + size)[:-1]
        apart[:-1] &= apart[1:]
        edges = place.reshape(2, -1)
        by_run = Forest(runs.size)
        by_run.unite([(edges[0], edges[1])])
        whole = np.ones(runs.size, bool)
        np.logical_and.at(whole, by_run.label, apart)
        # Runs that overlap others are gone through atom by atom.
        alone = whole[by_run.label]
        least = first[by_run.label]
        self.label[_atoms(first[alone], size[alone])] = _atoms(least[alone], size[alone])
        rest = ~alone
        self.unite([(_atoms(first[rest], size[rest]), _atoms(least[rest], size[rest]))])


def _atoms(first: Vector, sizes: Vector) -> Vector:
    """The atoms of runs, one run after the other."""
    ends = np.cumsum(sizes)
    return np.arange(sizes.sum()) + np.repeat(first - ends + sizes, sizes)


def _least(one: Vector, other: Vector, count: int) -> Vector:
    """For each of `count` nodes the least one that these edges lead to."""
    label = np.arange(count)
    while one.size:
        np.minimum.at(label, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(above := label[label], label):
            label = above
        one, other = label[one], label[other]
        apart = one != other
        one, other = one[apart], other[apart]
    return label
