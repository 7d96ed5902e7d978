"""Layers as parts of parameters: which of them, and along which dimension their filters lie.

A convolution or linear layer is its weight. A `BareLayer` is any parameters whose channels go
together index by index: a weight that no layer holds, scale and shift of a norm, an embedding.
What sums over a filter's elements sums over its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Part(NamedTuple):
    """A parameter's place in a model, which stays the same when the parameter is exchanged.

    Attributes:
        module, leaf: the module that holds it, and under which name.
        axis: the dimension that counts filters.
    """

    module: nn.Module
    leaf: str
    axis: int

    @property
    def parameter(self) -> Tensor:
        value: Tensor = getattr(self.module, self.leaf)
        return value


class BareLayer(nn.Module):
    """Parameters that have as many filters as each other, and no forward pass of their own.

    It is a module only to stand beside layers; it is none of the model's.

    Attributes:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    @property
    def weight(self) -> Tensor:
        """The first of its parameters."""
        return self.parts[0].parameter

    @property
    def out_features(self) -> int:
        """How many filters it has."""
        return self.weight.size(self.parts[0].axis)


def bare_layer(model: nn.Module, places: Sequence[tuple[str, int]]) -> BareLayer:
    """The layer of parameters by name, each with the dimension that counts filters."""
    parts = []
    for name, axis in places:
        owner, _, leaf = name.rpartition(".")
        parts.append(Part(model.get_submodule(owner), leaf, axis))
    return BareLayer(parts)
