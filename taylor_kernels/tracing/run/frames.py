"""What is known of a module while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import NormCall
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.steps import Step


class Frame:
    """A module that is running, or the code outside of all.

    Attributes:
        module: None for the code outside.
        name: the module's, "" for the model itself and the code outside.
        given: the module's positional arguments, if all of them are tensors; else nothing.
        mixed: some of them are none.
        first: so many vectors had been fixed before it began.
        met: the labels of all tensors that its own code had at hand.
        leaf: it has run no other module so far.
        norms: those that its own code has called as functions.
        made: the steps in it, the tensors that they made, and the channels' dimension in these.
    """

    __slots__ = ("first", "given", "leaf", "made", "met", "mixed", "module", "name", "norms")

    def __init__(  # by hand: there is one for each call of each module
        self,
        module: nn.Module | None = None,
        name: str = "",
        given: Sequence[Tensor] = (),
        first: int = 0,
        met: list[Labels] | None = None,
        *,
        mixed: bool = False,
    ) -> None:
        self.module, self.name, self.given, self.first = module, name, given, first
        self.met: list[Labels] = [] if met is None else met
        self.leaf, self.mixed = True, mixed
        self.made: list[tuple[Step, Tensor, int]] = []
        self.norms: list[NormCall] = []

    def meets(self, width: int) -> bool:
        """Whether a tensor that its own code had at hand is as wide, in channels."""
        every = (dim for labels in self.met for dim in labels.dims)
        return any(dim is not None and dim.size == width for dim in every)

    def as_wide(self, vector: Vector, *, first: bool = False) -> list[Vector]:
        """Other vectors of this size, of tensors that its own code had at hand.

        Args:
            first: none where this one itself was met before all of them.
        """
        found: list[Vector] = []
        mine = vector.tobytes()  # to compare arrays this short takes NumPy ten times as long
        known = {mine}
        for labels in self.met:
            for other in labels.dims:
                if other is None or other.size != vector.size:
                    continue
                atoms = other.tobytes()
                if first and not found and atoms == mine:
                    return []
                if atoms not in known:
                    known.add(atoms)
                    found.append(other.copy())
        return found
