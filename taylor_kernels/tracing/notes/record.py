"""The record of a run: everything that it says about its atoms."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from taylor_kernels.tracing.notes.atoms import MEETS_FIXED, Reason, Vector
from taylor_kernels.tracing.notes.entries import Cut, Echo, Join, NormCall, Size, Table
from taylor_kernels.tracing.notes.steps import Norm, Product, Step
from taylor_kernels.tracing.notes.values import Values

if TYPE_CHECKING:
    from taylor_kernels.tracing.notes.across import Across
    from taylor_kernels.tracing.notes.chains import Chain
    from taylor_kernels.tracing.notes.experts import Mixture

#: So many numbers a trace writes down at most: 2 GiB.
MOST = 2**28


@dataclass
class Record:
    """Everything that a run says about its atoms.

    Attributes:
        count: the number of the next new atom.
        starts: (first atom, name, dimension, size) of the dimensions of parameters and buffers,
            ascending.
        joins: which atoms are one.
        fixed: atoms that cannot go, and why.
        across: calls of modules that may be norms across channels.
        mixtures: routers and their experts.
        tables: how dimensions were cut into grids, and grids made one dimension.
        cuts: of which dimensions parts were taken.
        norms, products, steps: what channels go through.
        sizes: which attributes count which atoms.
        echoes: sizes that code wrote down, and that other tensors have too.
        heads: of attentions.
        fills: tensor -> dimension -> what masked entries hold, where that is not zero.
        step: how many operations have run.
        failures: operations whose rule did not foresee their arguments; their channels stay.
        size: how many numbers joins, fixed vectors and new atoms are; no more than `MOST`.
        ran: names of the modules that ran.
        norm_calls: the norms that modules' own code has called as functions, run by run.
        chains: stages whose channels may change places as some of them go.
        values: where tensors came from, if that is followed.
        guesses: attributes whose number is that of parts that code has left to PyTorch to count,
            and entries of lists and settings that hold a size that code wrote down.
        seen: the first atoms of the dimensions of what was given to operations that do more than
            move elements.
        unread: tensors that the run in eval mode has not seen, and that may lie along channels.
        trained: further runs were in train mode, which does more than eval mode.
        written: parameters and buffers that code has written into in some run.
        squeezed: dimensions that code drops where they are of one place.
        divisors: (tensor, dimension) that operations have met which are not finite at zero.
        ones: those of them that were known before the run: they are masked with ones.
        asked: modules whose code has asked for values: on other inputs it may go another way.
        counted: those of them that have asked how many results there are, or modules around them.
    """

    count: int = 1
    starts: list[tuple[int, str, int, int]] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    fixed: list[tuple[Vector, Reason]] = field(default_factory=list)
    across: list[Across] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    norm_calls: list[tuple[str, list[NormCall]]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    echoes: list[Echo] = field(default_factory=list)
    guesses: list[Size] = field(default_factory=list)
    heads: list[Vector] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    fills: dict[str, dict[int, float]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    trained: bool = False
    written: list[str] = field(default_factory=list)
    squeezed: list[Vector] = field(default_factory=list)
    divisors: set[tuple[str, int]] = field(default_factory=set)
    ones: frozenset[tuple[str, int]] = frozenset()
    asked: set[str] = field(default_factory=set)
    counted: set[str] = field(default_factory=set)
    values: Values | None = None
    step: int = 0
    size: int = 0
    _reasons: dict[tuple[str, tuple[str, str], bool], Reason] = field(default_factory=dict)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is written down inside is crossed out again after an error."""
        lists = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), list)}
        lengths = {name: len(value) for name, value in lists.items()}
        ran, seen, fills = self.ran, self.seen, copy.deepcopy(self.fills)
        divisors = self.divisors.copy()
        self.ran, self.seen = set(), set()  # to copy those that there are takes long
        try:
            yield
        except BaseException:
            for name, length in lengths.items():
                del lists[name][length:]
            self.ran, self.seen, self.fills, self.divisors = ran, seen, fills, divisors
            raise
        ran |= self.ran
        seen |= self.seen
        self.ran, self.seen = ran, seen

    def fresh(self, size: int) -> Vector:
        """New atoms."""
        self._grow(size)
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def _grow(self, numbers: int) -> None:
        self.size += numbers
        if self.size > MOST:
            raise MemoryError(
                f"model: its trace is of more than {MOST} labels; pass a smaller example (fewer "
                "entries, steps or pixels)"
            )

    def tensor(self, name: str, shape: Sequence[int]) -> list[Vector]:
        """The atoms of a parameter or buffer, a vector for each dimension."""
        start = self.count
        every = self.fresh(sum(shape))
        vectors = []
        for dim, size in enumerate(shape):
            self.starts.append((start, name, dim, size))
            vectors.append(every[start - self.count : start - self.count + size or None])
            start += size
        return vectors

    def zeros(self, name: str, dims: int) -> list[bool]:
        """For each dimension of a parameter or buffer whether masking writes zeros there."""
        return [(name, dim) not in self.ones for dim in range(dims)]

    def reason(self, text: str, where: tuple[str, str], *, mixer: bool = False) -> Reason:
        """A reason that names where this happens: module and operation."""
        key = (text, where, mixer)
        if (found := self._reasons.get(key)) is None:
            module, name = where
            place = f"{name} in {module!r}" if module else name
            kind = name.lstrip("_") if mixer else ""
            found = self._reasons[key] = Reason(f"{text} ({place})", module, name, kind)
        return found

    def join(self, one: Vector | None, other: Vector | None, where: tuple[str, str]) -> None:
        """Place by place these are one; what meets a fixed place is fixed."""
        if one is None or other is None:
            if one is not other:
                self.fix(one if other is None else other, self.reason(MEETS_FIXED, where))
        elif one is not other:
            self._grow(2 * one.size)
            self.joins.append(Join(one.copy(), other.copy(), where, len(self.fixed)))

    def fix(self, vector: Vector | None, reason: Reason) -> None:
        """These atoms cannot go."""
        if vector is not None:
            self._grow(vector.size)
            self.fixed.append((vector.flatten(), reason))

    def grid(
        self,
        cells: npt.NDArray[np.int64],
        where: tuple[str, str],
        kind: str = "reshape",
        allowed: Collection[int] | None = None,
    ) -> list[Vector | None]:
        """The axes of a grid of atoms: vectors for the dimensions that its atoms depend on.

        Args:
            allowed: the dimensions that may shrink, None for all.
        """
        axes: list[Vector | None] = [None] * cells.ndim
        if not cells.any():
            return axes
        on = [
            dim
            for dim in range(cells.ndim)
            if cells.shape[dim] > 1 and (cells != cells.take([0], axis=dim)).any()
        ]
        if not on:
            # One atom everywhere: a dimension of size one that was repeated, or is still one.
            if cells.size == 1:
                axes[-1] = cells.reshape(1)
            else:
                reason = Reason("is a single channel that is broadcast", *where)
                self.fix(cells.reshape(-1)[:1], reason)
            return axes
        core = cells[tuple(slice(None) if dim in on else 0 for dim in range(cells.ndim))]
        if len(on) == 1:
            axes[on[0]] = core
            if allowed is not None and on[0] not in allowed:
                self.fix(core, Reason("is given a constant size", *where))
            return axes
        fresh = [self.fresh(size) for size in core.shape]
        may = tuple(i for i, dim in enumerate(on) if allowed is None or dim in allowed)
        self.tables.append(Table(core.flatten(), tuple(fresh), kind, may, where))
        for dim, axis in zip(on, fresh, strict=True):
            axes[dim] = axis
        return axes

    def merge(
        self, sizes: Sequence[int], axes: Sequence[Vector | None], where: tuple[str, str]
    ) -> Vector | None:
        """The atoms of the single dimension that a grid with these axes is made into."""
        on = [dim for dim, axis in enumerate(axes) if axis is not None and axis.any()]
        if not on:
            return None
        shape = tuple(sizes)
        if len(on) == 1:
            axis: Any = axes[on[0]]
            view = axis.reshape([-1 if dim == on[0] else 1 for dim in range(len(shape))])
            return np.broadcast_to(view, shape).flatten()
        core = [axes[dim] for dim in on]
        small = tuple(shape[dim] for dim in on)
        cells = self.fresh(prod(small))
        axes_on = tuple(axis for axis in core if axis is not None)
        every = tuple(range(len(axes_on)))
        self.tables.append(Table(cells, axes_on, "reshape", every, where))
        spread = [shape[dim] if dim in on else 1 for dim in range(len(shape))]
        return np.broadcast_to(cells.reshape(spread), shape).flatten()
