"""Tables of layers that lie in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_

import torch
from torch import Tensor


class PackedTables(list[Tensor]):
    """Tables of layers, [F, K] each, that lie one after the other in one tensor.

    A list as any other. Who wants all of them in one tensor takes `rows`, instead of putting dozens
    together that were taken apart a moment before.

    Args:
        rows: [sum of all F, K].
        sizes: the F of each layer, by its name.

    Attributes:
        layers: the names.
    """

    def __init__(self, rows: Tensor, sizes: Mapping[str, int]) -> None:
        super().__init__(torch.split_with_sizes(rows, list(sizes.values())))
        self._rows, self._parts = rows, tuple(self)
        self.layers = list(sizes)

    @property
    def rows(self) -> Tensor | None:
        """All of them in one, in the same memory; None where the list has others by now."""
        same = len(self) == len(self._parts) and all(map(is_, self, self._parts))
        return self._rows if same else None


def rows_of_all(tables: Sequence[Tensor]) -> Tensor | None:
    """The rows of all tables, one after the other, where they lie so already."""
    return tables.rows if isinstance(tables, PackedTables) else None
