"""Which models pruners are in use on: no two cut the same tensor."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import Tensor, nn


class Cutter(Protocol):
    """What cuts tensors of a model as long as it is in use."""

    in_use: bool

    def cut(self) -> dict[str, Tensor]:
        """The tensors that it cuts, by their names in its model."""


#: Model -> what cut it last.
_LAST: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Cutter]] = weakref.WeakKeyDictionary()


def take_over(model: nn.Module, cutter: Cutter) -> None:
    """Let this be what cuts a model."""
    _LAST[model] = weakref.ref(cutter)


def check_free(model: nn.Module) -> None:
    """No pruner of this model is in use.

    Raises:
        ValueError: one is.
    """
    last = _LAST.get(model)
    cutter = None if last is None else last()
    if cutter is not None and cutter.in_use:
        raise ValueError(
            "model: an earlier Pruner of it is open, whose filters this one would cut; close() "
            "that one first (compact() before, to remove what it has masked)"
        )


def check_apart(cutter: Cutter) -> None:
    """No pruner in use cuts a tensor of another model that this one cuts too.

    Raises:
        ValueError: one does.
    """
    mine = {id(t): name for name, t in cutter.cut().items()}
    for last in list(_LAST.values()):
        other = last()
        if other is None or other is cutter or not other.in_use:
            continue
        if both := [mine[id(t)] for t in other.cut().values() if id(t) in mine]:
            raise ValueError(
                f"model: {both[0]!r} is a part of another model too, of which a Pruner is open and "
                "would cut it; close() that one first (compact() before, to remove what it has "
                "masked), or make one Pruner of a module that holds both models"
            )
