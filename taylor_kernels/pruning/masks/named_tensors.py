"""Parameters and buffers by name, found again at every step in a small part of a step's time."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class NamedTensors:
    """The way to tensors of a model by their names.

    It is gone anew at each look, since others may put tensors, and modules, in the places of those
    that there are; the way to a module is gone once for all tensors in it and below.

    Attributes:
        names: in the order that they were given in.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        # Modules, each behind the one that it lies in: that one's number, its own name there, and
        # the places and names of what is wanted of it.
        self._way: list[tuple[int, str, list[tuple[int, str]]]] = []
        self._at_root: list[tuple[int, str]] = []
        numbers = {"": 0}
        wanted = {"": self._at_root}
        for place, name in enumerate(self.names):
            path, _, leaf = name.rpartition(".")
            known = ""
            for part in path.split(".") if path else ():
                inside, known = known, f"{known}.{part}" if known else part
                if known not in numbers:
                    numbers[known], wanted[known] = len(numbers), []
                    self._way.append((numbers[inside], part, wanted[known]))
            wanted[path].append((place, leaf))

    def of(self, model: nn.Module) -> list[Tensor | None]:
        """A tensor for each name; None for those that are not there."""
        found: list[Tensor | None] = [None] * len(self.names)
        modules: list[nn.Module | None] = [model]
        for place, leaf in self._at_root:
            found[place] = _held(model, leaf)
        for inside, part, wanted in self._way:
            outer = modules[inside]
            module = None if outer is None else outer._modules.get(part)
            modules.append(module)
            if module is not None:
                for place, leaf in wanted:
                    found[place] = _held(module, leaf)
        return found


def _held(module: nn.Module, leaf: str) -> Tensor | None:
    held: Tensor | None = module._parameters.get(leaf)
    if held is None:
        held = module._buffers.get(leaf)
    return module.__dict__.get(leaf) if held is None else held
