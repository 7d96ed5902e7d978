"""Names that are of one tensor, as those of tied weights: they have to stay so.

A tensor is cut by one of its names, and put in the places of all that it has then. Where code has
parted two since, as `load_state_dict(assign=True)` does, one of them would keep its width; where it
has tied two, one would lose channels that its reader does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import Tensor, nn


class Ties:
    """Which other names the tensors have that a pruner cuts.

    Args:
        names: of the tensors, each by one.
        tensors: of these names.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], tensors: Sequence[Tensor | None]
    ) -> None:
        self._names = names
        self._other = self._found(model, tensors)

    def _found(self, model: nn.Module, tensors: Sequence[Tensor | None]) -> dict[str, str]:
        firsts: dict[int, str] = {}
        for name, tensor in zip(self._names, tensors, strict=True):
            if tensor is not None:
                firsts.setdefault(id(tensor), name)
        return {
            name: firsts[id(tensor)]
            for name, tensor in _every(model)
            if firsts.get(id(tensor), name) != name
        }

    def check(self, model: nn.Module, tensors: Sequence[Tensor | None]) -> None:
        """They are still the same ones; names that are gone are nobody's.

        Args:
            tensors: those that the names have now.

        Raises:
            RuntimeError: code has parted or tied some.
        """
        now = self._found(model, tensors)
        if now == self._other:
            return
        there = {name for name, _ in _every(model)}
        gone = [n for n in self._other if n not in now and n in there and self._other[n] in there]
        if gone:
            raise RuntimeError(
                f"model: {gone[0]} and {self._other[gone[0]]} were one tensor when this pruner was "
                "made and are two now (load_state_dict(assign=True) parts them, as a parameter "
                "does that is put in the place of one): tie them again, or close() this pruner and "
                "make a new one"
            )
        if more := [name for name in now if self._other.get(name) != now[name]]:
            raise RuntimeError(
                f"model: {more[0]} and {now[more[0]]} have become one tensor since this pruner was "
                "made, which took them for two; close() it and make a new one after that"
            )


def _every(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model by all their names."""
    return chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
