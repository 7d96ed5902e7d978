"""What a run wrote down about atoms: which are one, which are fixed and why, how reshapes cut them.

An atom is an int64 number: one index of one dimension of a parameter or buffer, or a place that a
reshape made. Atom 0 stands for what is no parameter's and can never go (a batch entry, a pixel, a
channel of the input). Vectors of atoms are numpy arrays: they are short, and there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
#: Kinds of steps.
NORM, PRODUCT, END = "norm", "product", "end"


@dataclass(frozen=True)
class Reason:
    """Why atoms cannot go.

    Attributes:
        text: one clause that completes "this channel ...".
        module: the module that ran, "" for the model itself.
        operation: the operation's name, "" where no operation is to blame.
        mixer: the kind of normalisation or reduction that mixes these atoms ("native_layer_norm",
            "softmax", ...), "" where nothing is mixed. A caller that knows what removal means for
            a kind can lift it: see `Channels.lifting`.
    """

    text: str
    module: str = ""
    operation: str = ""
    mixer: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """A dimension that was cut into a grid, or a grid that was made one dimension.

    Cell (i, j, ...) of the grid goes where i of the first axis, or j of the second, ... goes.

    Attributes:
        cells: the atoms of the grid, row by row.
        axes: one vector of atoms for each dimension of the grid.
        kind: "reshape", or "groups" of a convolution.
        allowed: the axes that the code may let shrink; the sizes of the others are constants.
        where: module and operation.
    """

    cells: Vector
    axes: tuple[Vector, ...]
    kind: str
    allowed: tuple[int, ...]
    where: tuple[str, str]


@dataclass(frozen=True)
class Cut:
    """A dimension of which parts were taken: vector[start:stop] for each part.

    Attributes:
        source: says which tensor it was, so that several slices of one tensor are one cut.
        equal: the operation itself makes equal parts (chunk).
        tied: every part's size is an attribute of a module, which can follow.
    """

    vector: Vector
    parts: tuple[tuple[int, int], ...]
    source: tuple[int, int]
    equal: bool
    tied: bool
    where: tuple[str, str]


@dataclass(frozen=True)
class Norm:
    """A normalisation over batch and space, channel by channel (BatchNorm, InstanceNorm).

    Attributes:
        module: the module that ran; its class need not be a BatchNorm's.
        atoms: the channels that it normalises, in their order.
        weight: the name of its scale, "" where it has none.
        step: when it ran.
    """

    module: str
    atoms: Vector
    weight: str
    step: int


@dataclass(frozen=True)
class Product:
    """A weight that was multiplied with an activation: one use of a layer.

    Attributes:
        weight: the parameter's name.
        module: the module that owns it.
        inputs, outputs: atoms of the channels as the layer counts them.
        groups: atoms of the groups of a grouped convolution, else None.
        macs: how many multiply-adds it took.
        caller: the module that ran: another than `module` where code uses the weight of a layer
            that it does not call.
        step: when it ran.
    """

    weight: str
    module: str
    inputs: Vector
    outputs: Vector
    groups: Vector | None
    macs: int
    caller: str
    step: int


@dataclass
class Step:
    """A norm, a product, or an end of channels: another contraction, or the model's output.

    Attributes:
        kind: NORM, PRODUCT or END.
        module: the module that ran.
        layer: the layer whose weight was multiplied with, "" for other steps.
        inputs: atoms of the channels that it takes.
        outputs: atoms of the channels that it gives; none for an end.
        sources: numbers of the steps that its input was made by, with no other step between.
        depthwise: each output channel is made of one input channel.
        input_dim: the channels' dimension, from the end, in the only tensor that the module was
            given; None where the step's input is not that tensor.
        output_dim: the same in the tensor that the module returned.
    """

    kind: str
    module: str
    inputs: Vector
    outputs: Vector
    sources: frozenset[int]
    layer: str = ""
    depthwise: bool = False
    input_dim: int | None = None
    output_dim: int | None = None


@dataclass(frozen=True)
class Size:
    """An attribute of a module that counts these atoms.

    Attributes:
        weak: it may be another's size by chance; others for this attribute come before.
    """

    module: str
    attribute: str
    atoms: Vector
    weak: bool


@dataclass
class Record:
    """Everything that a run says about its atoms.

    Attributes:
        failures: operations whose rule did not foresee their arguments; their channels stay.
    """

    count: int = 1
    starts: list[tuple[int, str, int, int]] = field(default_factory=list)
    edges: list[tuple[Vector, Vector]] = field(default_factory=list)
    fixed: list[tuple[Vector, Reason]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    heads: list[Vector] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    fills: dict[str, dict[int, float]] = field(default_factory=dict)
    step: int = 0

    def fresh(self, size: int) -> Vector:
        """New atoms."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def tensor(self, name: str, shape: Sequence[int]) -> list[Vector]:
        """The atoms of a parameter or buffer, a vector for each dimension."""
        vectors = []
        for dim, size in enumerate(shape):
            self.starts.append((self.count, name, dim, size))
            vectors.append(self.fresh(size))
        return vectors

    def join(self, one: Vector | None, other: Vector | None, reason: Callable[[], Reason]) -> None:
        """Place by place these are one; what meets a fixed place is fixed for this reason."""
        if one is other:
            return
        if one is None or other is None:
            lone = one if other is None else other
            if lone is not None and lone.any():
                self.fix(lone, reason())
            return
        if not (one.all() and other.all()):
            free = (one == 0) | (other == 0)
            if (lone := np.maximum(one, other)[free]).any():
                self.fix(lone, reason())
            one, other = one[~free], other[~free]
        if one.size and not np.array_equal(one, other):
            self.edges.append((one.copy(), other.copy()))

    def fix(self, vector: Vector | None, reason: Reason) -> None:
        """These atoms cannot go."""
        if vector is not None and vector.any():
            self.fixed.append((vector[vector != 0].ravel(), reason))

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
        cells = self.fresh(int(np.prod(small)))
        axes_on = tuple(axis for axis in core if axis is not None)
        every = tuple(range(len(axes_on)))
        self.tables.append(Table(cells, axes_on, "reshape", every, where))
        spread = [shape[dim] if dim in on else 1 for dim in range(len(shape))]
        return np.broadcast_to(cells.reshape(spread), shape).flatten()
