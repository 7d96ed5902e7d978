"""What is known of a module while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from taylor_kernels.tracing.labels import Labels
from taylor_kernels.tracing.record import NormCall
from taylor_kernels.tracing.steps import Step


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
