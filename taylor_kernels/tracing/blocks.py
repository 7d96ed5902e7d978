"""Residual blocks: what goes of a model with one, and what removal leaves in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from taylor_kernels.tracing.notes.values import Path


@dataclass(frozen=True)
class Place:
    """A module that a removed block leaves another one in place of.

    Attributes:
        module: its name.
        like: position or keyword of the argument whose shape zeros are returned in; None where
            the module becomes the identity.
        returned: where in its output the branch's tensor is: () for the output itself, (number,
            length) in a tuple, whose other entries become None.
    """

    module: str
    like: int | str | None
    returned: Path = ()


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        name: the module that is the block, or else the one that gives the branch's output.
        output: the module that gives the branch's output, and where in its own output that is.
        places: what removal replaces.
        open_places: the same without a module as a whole, for models that ask more of it.
        modules: the names of all modules that go.
        steps: numbers of the operations of the branch, as the run counted them.
        scale: the layer or norm whose weight and bias a factor on the branch's output can be taken
            into; "" if there is none.
    """

    name: str
    output: Place
    places: tuple[Place, ...]
    open_places: tuple[Place, ...]
    modules: frozenset[str]
    steps: frozenset[int]
    scale: str = ""

    def opened(self) -> Block:
        """The block whose modules are replaced one by one."""
        gone = {place.module for place in self.open_places}
        inside = {
            name
            for name in self.modules
            if any(name == one or name.startswith(f"{one}.") for one in gone)
        }
        return replace(
            self, name=self.output.module, places=self.open_places, modules=frozenset(inside)
        )

    def holds(self, name: str) -> bool:
        """Whether a module, or the tensor of that name, goes with the block."""
        return name in self.modules or name.rpartition(".")[0] in self.modules


class Zeros(nn.Module):
    """What is left of a module whose output is to be zero: it holds nothing and computes nothing.

    Args:
        like: position or keyword of the argument whose shape, dtype and device the zeros have.
        returned: as in `Place`.
    """

    def __init__(self, like: int | str = 0, returned: Sequence[int] = ()) -> None:
        super().__init__()
        self._like, self._returned = like, tuple(returned)

    def forward(self, *args: object, **kwargs: object) -> object:
        given = args[self._like] if isinstance(self._like, int) else kwargs[self._like]
        assert isinstance(given, Tensor)
        zeros = torch.zeros_like(given)
        if not self._returned:
            return zeros
        number, length = self._returned
        return tuple(zeros if place == number else None for place in range(length))

    def extra_repr(self) -> str:
        return "" if not self._like and not self._returned else f"{self._like!r}, {self._returned}"


#: Settings that other modules read off the ones inside them.
_PLAIN = (bool, int, float, str, type(None))
#: What nn.Module sets itself.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def replace_modules(model: nn.Module, places: Sequence[Place]) -> None:
    """Put into a model what a removed block leaves of it, in place.

    Numbers, strings and flags that a module holds are handed on, and its parameters are None, since
    code around it may ask for them.
    """
    for place in places:
        old = model.get_submodule(place.module)
        new = nn.Identity() if place.like is None else Zeros(place.like, place.returned)
        for name, value in vars(old).items():
            if name not in _OF_EVERY_MODULE and isinstance(value, _PLAIN):
                new.__dict__.setdefault(name, value)
        for name in (*old._parameters, *old._buffers):
            new.register_parameter(name, None)
        new.train(old.training)
        for around in model.modules():
            for leaf in [leaf for leaf, module in around._modules.items() if module is old]:
                setattr(around, leaf, new)
                if isinstance(around, nn.TransformerEncoderLayer):
                    around.activation_relu_or_gelu = 0  # its fused form reads all weights by itself
