"""Labels of tensors: for each dimension the atoms of its places, kept for as long as the tensor.

A label tensor that is constant along all dimensions but one is stored as the vector along that
one. Views of a tensor hold views of its vectors, so that what is written through a view is seen in
the base without further rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import ref

from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.operations import address_of


def has_atoms(vector: Vector) -> bool:
    """vector.any(), which is slow for vectors this short: mostly their first place tells."""
    return bool(vector.size) and (vector.item(0) != 0 or bool(vector.any()))


@dataclass(slots=True)
class Memory:
    """What holds for all views of one tensor.

    Attributes:
        spoiled: something was written that is not zero where the atoms are masked.
        repeated: there may be dimensions along which one place was repeated.
        uneven: something was written into a part, so that what was one value is several.
    """

    spoiled: bool = False
    repeated: bool = False
    uneven: bool = False


@dataclass(slots=True)
class Labels:
    """The labels of one tensor.

    Attributes:
        shape: the tensor's.
        dims: a vector of atoms for each dimension; None where all places are fixed.
        zero: for each dimension, whether the values at a place are zero where its atom is masked.
        uniform: all values are one constant that code made: its places can follow any width.
        loose: dimensions along which one place was repeated: they couple nothing.
        name: the parameter or buffer that this is, or is a transpose or slice of, or is computed of
            place by place.
        computed: its values are not that one's own.
        counted: of a constant, (dimension, module, attribute) of attributes that hold its sizes.
        kept_if_read: atoms that cannot go, and why, once something is made of this tensor.
    """

    shape: tuple[int, ...]
    dims: list[Vector | None]
    zero: list[bool]
    uniform: bool = False
    loose: frozenset[int] = frozenset()
    name: str = ""
    computed: bool = False
    memory: Memory = field(default_factory=Memory)
    counted: tuple[tuple[int, str, str], ...] = ()
    kept_if_read: tuple[tuple[Vector, Reason], ...] = ()

    @classmethod
    def fixed(cls, shape: Sequence[int]) -> Labels:
        """The labels of a tensor that no parameter has made."""
        return cls(tuple(shape), [None] * len(shape), [False] * len(shape))

    def is_zero(self, dim: int) -> bool:
        return self.zero[dim] and not self.memory.spoiled

    @property
    def is_uniform(self) -> bool:
        return self.uniform and not self.memory.uneven

    @property
    def repeated(self) -> frozenset[int]:
        """The dimensions that are loose still."""
        return frozenset() if self.memory.uneven else self.loose

    @property
    def labelled(self) -> list[int]:
        """The dimensions that have atoms."""
        return [i for i, dim in enumerate(self.dims) if dim is not None and has_atoms(dim)]

    def vectors(self) -> list[Vector]:
        return [dim for dim in self.dims if dim is not None and has_atoms(dim)]


class Store:
    """The labels of all tensors that are alive; it keeps none of them alive."""

    def __init__(self) -> None:
        self._labels: dict[int, tuple[ref[Tensor], Labels]] = {}
        self._owners: dict[int, ref[Tensor]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether this very object has labels."""
        found = self._labels.get(id(tensor))
        return found is not None and found[0]() is tensor

    def get(self, tensor: Tensor) -> Labels | None:
        """A tensor's labels, also where it is another Python object for a labelled one."""
        # An id is used again when a tensor is gone.
        found = self._labels.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        address = address_of(tensor)
        owner = self._owners.get(address, _nobody)() if address else None
        if (
            owner is None
            or owner.shape != tensor.shape
            or owner.stride() != tensor.stride()
            or owner.dtype != tensor.dtype
        ):
            return None
        found = self._labels.get(id(owner))
        return found[1] if found is not None and found[0]() is owner else None

    def set(self, tensor: Tensor, labels: Labels) -> None:
        mine = ref(tensor)
        self._labels[id(tensor)] = mine, labels
        for dim in labels.dims:
            if dim is not None:
                self._owners[address_of(tensor)] = mine
                return


def _nobody() -> None:
    """As a reference to a tensor that is gone."""
