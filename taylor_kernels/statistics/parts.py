"""Layers as parts of parameters: which of them, and along which dimension their filters lie.

A convolution or linear layer is its weight. A `BareLayer` is any parameters whose channels go
together index by index: a weight that no layer holds, scale and shift of a norm, an embedding.
What sums over a filter's elements sums over its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

#: Where the filters of a parameter lie that only a trace of the model can tell.
UNKNOWN = -1


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
    """The layer of parameters by name, each with the dimension that counts filters.

    Raises:
        ValueError: that is `UNKNOWN` of one.
    """
    parts = []
    for name, axis in places:
        if axis == UNKNOWN:
            shape = tuple(model.get_parameter(name).shape)
            raise ValueError(
                f"layers: nothing says along which dimension of {name} {shape} its filters lie: "
                "pass example_inputs=, by which a trace tells that of a weight that is multiplied "
                "by; others of such a shape have no filters and cannot be scored"
            )
        owner, _, leaf = name.rpartition(".")
        parts.append(Part(model.get_submodule(owner), leaf, axis))
    return BareLayer(parts)


def parts_beside_layers(
    model: nn.Module,
    is_layer: Callable[[nn.Module | None], bool],
    known: Mapping[str, Sequence[tuple[str, int]]],
) -> dict[str, list[tuple[str, int]]]:
    """Everything of a model that layers do not hold and that channels lie along.

    Args:
        known: weights that a trace has seen in use, as `Channels.bare` names them.

    Returns:
        In the model's order: a norm -> its scale and shift; an embedding -> its columns; a bilinear
        layer -> the outputs of its weight; any other parameter -> what is `known` of it, or its
        next-to-last dimension, in which functional.linear takes outputs. Of one with more than two
        dimensions nothing says which: `UNKNOWN`.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    for name, module in model.named_modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None}
        prefix = f"{name}." if name else ""
        if is_layer(module) or not own or name in known:
            pass
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found[name] = [(f"{prefix}weight", 1)]
        elif isinstance(module, nn.Bilinear):
            found[name] = [(f"{prefix}weight", 0)]
        elif _is_norm(module, own):
            found[name] = [(prefix + leaf, 0) for leaf in own]
        else:
            for leaf, parameter in own.items():
                if parameter.dim():
                    several = parameter.dim() > 2 or isinstance(module, nn.LayerNorm)
                    axis = UNKNOWN if several else max(parameter.dim() - 2, 0)
                    # Under the name that a trace would give it.
                    known_as = name if leaf == "weight" and name else prefix + leaf
                    found[known_as] = [(prefix + leaf, axis)]
    modules = dict(model.named_modules())
    others = {n: list(parts) for n, parts in known.items() if not is_layer(modules.get(n))}
    return found | others


def _is_norm(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Whether a module is a vector or two along one dimension of what it is given, of any class."""
    shapes = {tuple(parameter.shape) for parameter in own.values()}
    return not module._modules and len(shapes) == 1 and len(*shapes) == 1
