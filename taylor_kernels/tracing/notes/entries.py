"""What a run writes down about atoms: which met, how reshapes cut them, what counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from taylor_kernels.tracing.model.code import Place
from taylor_kernels.tracing.notes.atoms import Vector


class Join(NamedTuple):
    """Two vectors whose atoms are one, place by place; an atom that meets none is fixed.

    Attributes:
        where: module and operation.
        after: so many vectors had been fixed before.
    """

    one: Vector
    other: Vector
    where: tuple[str, str]
    after: int


@dataclass(frozen=True)
class Table:
    """A dimension that was cut into a grid, or a grid that was made one dimension.

    Cell (i, j, ...) of the grid goes where i of the first axis, or j of the second, ... goes.

    Attributes:
        cells: the atoms of the grid, row by row.
        axes: one vector of atoms for each dimension of the grid.
        kind: "reshape", "groups" of a convolution, or "rows" of its weight: of those each group
            has to lose as many as the others, and not the same ones.
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
        short: it was asked for as many as there are, and the last part is shorter than the others.
        tied: every part's size is an attribute of a module, which can follow.
        others: of parts of unlike sizes, and of slices, what each part shrinks with: a vector of
            another tensor that is as wide and that the code had at hand, or the part itself where
            an attribute says its size; None where there is neither, so that it has to stay. What
            other slices leave shrinks by itself if another tensor is as wide, and has an empty
            vector here if none is.
        sizes: what attributes then say of the last part, which otherwise is what the others leave.
    """

    vector: Vector
    parts: tuple[tuple[int, int], ...]
    source: tuple[int, int]
    equal: bool
    tied: bool
    where: tuple[str, str]
    others: tuple[Vector | None, ...] = ()
    sizes: tuple[Size, ...] = ()
    short: bool = False


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


@dataclass(frozen=True)
class Echo:
    """A size that code wrote down, where tensors that it had at hand are as wide.

    `y.reshape(n, c, -1)` may have c from y or from another tensor, which has to stay as wide then.

    Attributes:
        vector: what is given the size.
        others: what else has it, in the order in which it was met.
        where: module and operation.
        doubt: greater where an attribute has this size too, more so where it counts these, and
            most where the size is a product of several.
    """

    vector: Vector
    others: tuple[Vector, ...]
    where: tuple[str, str]
    doubt: int = 0


class NormCall(NamedTuple):
    """A call of a norm across channels as a function.

    Attributes:
        place: where in the code it is.
        channels: what it normalises over; None if that has no atoms, or is several dimensions.
        parameters: what its parameters have along them.
        fixed: where the record's `fixed` begins and ends to speak of this call.
    """

    place: Place
    channels: Vector | None
    parameters: tuple[Vector | None, ...]
    fixed: range
