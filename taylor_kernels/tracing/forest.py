"""Union-find over atoms, a batch of unions at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from taylor_kernels.tracing.record import Vector


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
        label, changed = self.label, False
        while True:
            low, high = label[one], label[other]
            apart = low != high
            if not apart.any():
                return changed
            changed = True
            one, other, low, high = one[apart], other[apart], low[apart], high[apart]
            np.minimum.at(label, np.maximum(low, high), np.minimum(low, high))
            while True:
                above = label[label]
                if np.array_equal(above, label):
                    break
                label = above
            self.label = label
