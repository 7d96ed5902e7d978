"""The values of a run as a graph: which sums add a tensor and what was made of it.

Values are numbered in the order in which they were made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from taylor_kernels.tracing.notes.values import Values
from taylor_kernels.tracing.rules.elementwise import PRODUCTS, QUOTIENTS
from taylor_kernels.tracing.run.calls import MOVES
from taylor_kernels.tracing.run.flow import CONTRACTIONS

#: Operations that only copy their one tensor.
_COPIES = {"clone", "_to_copy", "contiguous", "to", "alias", "detach"}
#: Operations that give no negative numbers where none come in.
_POOLS = {
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "max_pool1d", "avg_pool1d",
    "_adaptive_avg_pool2d", "native_dropout",
}  # fmt: skip
#: Operations that a factor in front of them, zero or near one, passes through.
_HOMOGENEOUS = MOVES | PRODUCTS | QUOTIENTS | _COPIES | _POOLS | {
    "view", "slice", "roll", "index_select", "constant_pad_nd", "neg", "relu", "leaky_relu",
    "dropout", "feature_dropout",
}  # fmt: skip


class ValueGraph:
    """What each value is made of, and what is made of it.

    Attributes:
        children: for each value the numbers of those that are made of it.
        live: for each value, whether an output of the model is made of it.
    """

    def __init__(self, values: Values) -> None:
        self._all = values.values
        self.children: list[list[int]] = [[] for _ in self._all]
        self._before = [0] * len(self._all)  # a bit for each value that this one is made of
        for number, value in enumerate(self._all):
            for parent in value.parents:
                self.children[parent].append(number)
                self._before[number] |= self._before[parent] | 1 << parent
        live = 0
        for number in values.outputs:
            live |= self._before[number] | 1 << number
        self.live = [bool(live >> number & 1) for number in range(len(self._all))]

    def sums(self) -> Iterator[tuple[int, int, list[int]]]:
        """Sums of a tensor x and of others that are made of it: the sum, x and the others."""
        for number in range(len(self._all)):
            if not self._is_sum(number) or not self.live[number]:
                continue
            readers = self.children[number]
            if len(readers) == 1 and self._is_sum(readers[0]):
                continue  # a part of a longer sum
            parts = list(self._parts(number))
            for part in sorted(parts, reverse=True):
                stream = self._origin(part)
                ends = [p for p in parts if p != part and self._before[p] >> stream & 1]
                if ends:
                    yield number, stream, ends
                    break

    def between(self, stream: int, end: int) -> frozenset[int]:
        """What is made of x on the way to the branch's end, and that."""
        before = self._before[end] | 1 << end
        return frozenset(
            number
            for number in range(stream + 1, end + 1)
            if before >> number & 1 and self._before[number] >> stream & 1
        )

    def inner_sums(self, number: int) -> Iterator[int]:
        """The sums that a sum is added up from and that nothing else reads."""
        for parent in self._all[number].parents[:2]:
            if self._is_sum(parent) and len(self.children[parent]) == 1:
                yield parent
                yield from self.inner_sums(parent)

    def is_product(self, number: int) -> bool:
        """Whether a value is a product of matrices or a convolution."""
        operation = self._all[number].operation
        return operation in CONTRACTIONS or operation.startswith("conv")

    def scaled_from(self, number: int, branch: Collection[int]) -> int | None:
        """The value of a branch that a factor passes on from to this one, unchanged; None if this
        is not made of just one of them, or not in such a way."""
        value = self._all[number]
        inside = [parent for parent in value.parents if parent in branch]
        return inside[0] if value.operation in _HOMOGENEOUS and len(inside) == 1 else None

    def is_stream(self, returned: int, total: int, stream: int) -> bool:
        """Whether a value is x once x is all there is of the sum."""
        if returned == total:
            return True
        value = self._all[returned]
        while self._all[stream].operation in _POOLS:
            stream = self._all[stream].parents[0]
        rectified = value.operation == self._all[stream].operation == "relu"
        return rectified and total in value.parents

    def _is_sum(self, number: int) -> bool:
        value = self._all[number]
        return (
            value.operation == "add"
            and len(value.parents) >= 2
            and all(self._all[parent].numel == value.numel for parent in value.parents[:2])
        )

    def _parts(self, number: int) -> Iterator[int]:
        for parent in self._all[number].parents[:2]:
            if self._is_sum(parent) and len(self.children[parent]) == 1:
                yield from self._parts(parent)
            else:
                yield parent

    def _origin(self, number: int) -> int:
        while self._all[number].operation in _COPIES and len(self._all[number].parents) == 1:
            number = self._all[number].parents[0]
        return number
