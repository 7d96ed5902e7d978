"""Other channels of the same run, for a caller that has found some of these to be wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from taylor_kernels.tracing.answer.units import Group
from taylor_kernels.tracing.answer.vectors import Vectors
from taylor_kernels.tracing.answer.written import with_written_sizes
from taylor_kernels.tracing.multihead import prunable_attention
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Table
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.resolving.choosing import Choice
from taylor_kernels.tracing.resolving.resolve import one_by_one
from taylor_kernels.tracing.run.running import one_at_a_time

_Channels = TypeVar("_Channels", bound="Alternatives")


class Alternatives:
    """What else a run may be taken to say of its channels.

    Attributes:
        choices: how each reshape that cuts channels was resolved.
    """

    choices: list[Choice]
    groups: list[Group]
    _record: Record
    _label: Vector
    _why: Vector
    _vectors: Vectors

    if TYPE_CHECKING:  # the constructor that the class with these methods has

        def __init__(self, record: Record, modules: Mapping[str, nn.Module]) -> None: ...

    def coupled(
        self: _Channels,
        model: nn.Module,
        layers: Collection[str],
        *,
        at: Collection[str] | None = None,
        guessed: bool = False,
        loosely: bool = False,
    ) -> _Channels | None:
        """The channels where sizes that code wrote down are those of other tensors.

        `y.reshape(n, c, -1)` says nothing of where c is from. Here it is taken from the first other
        tensor that the code had at hand and that is as wide, so that both lose the same channels.
        An attribute that sizes several tensors, which need not be the same by what they are made
        of (queries and values of a non-local block), is taken to be the size of all of them.

        Args:
            model: the traced model or a copy of it.
            layers: only sizes that count channels which one of these layers makes.
            at: only sizes that the code of these modules wrote down; None for all modules.
            guessed: they are numbers in lists and settings of the modules, and other tensors stay
                apart.
            loosely: any as many channels of the other tensor go, and not those of the same places.

        Returns:
            None where there are no such sizes.
        """
        asked = np.zeros(self._why.size, bool)
        for name in layers:
            asked[self._vectors.layers[name][1]] = True
        asked[0] = False
        modules = dict(model.named_modules())
        record = with_written_sizes(self._record, self._label, asked, modules, at, guessed, loosely)
        if record is None:
            return None
        with one_at_a_time(), prunable_attention(modules.values()):
            return type(self)(record, modules)

    def rearranged(self: _Channels, model: nn.Module) -> _Channels | None:
        """The channels where those of chains of shuffles go one by one, and change places.

        Units of the groups of a stage go in step, as `Group.stage` says; `orders` says what removal
        does to the order of the others.

        Args:
            model: the traced model or a copy of it.

        Returns:
            None where there are no such chains.
        """
        record = one_by_one(self._record)
        if record is None:
            return None
        with one_at_a_time(), prunable_attention(model.modules()):
            other = type(self)(record, dict(model.named_modules()))
        return other if any(group.stage is not None for group in other.groups) else None

    def otherwise(self: _Channels, model: nn.Module, wrong: Sequence[Tensor]) -> _Channels | None:
        """The channels where reshapes that cut these shrink along other axes than they do here.

        Args:
            model: the traced model or a copy of it.
            wrong: classes that cannot go as they are, one tensor a group.

        Returns:
            None where there is no other axis.
        """
        bad = np.zeros(self._why.size, bool)
        for classes in wrong:
            bad[classes.numpy()] = True
        pairs = zip(self._record.tables, self.choices, strict=True)
        tables = [_without(table, choice, bad[self._label[table.cells]]) for table, choice in pairs]
        if all(new is old for new, old in zip(tables, self._record.tables, strict=True)):
            return None
        with one_at_a_time(), prunable_attention(model.modules()):
            modules = dict(model.named_modules())
            return type(self)(replace(self._record, tables=tables), modules)


def _without(table: Table, choice: Choice, bad: npt.NDArray[np.bool_]) -> Table:
    """A table that does not shrink along the axis that was chosen, if that makes bad cells go."""
    if choice.axis is None or not bad.any():
        return table
    return replace(table, allowed=tuple(dim for dim in table.allowed if dim != choice.axis))
