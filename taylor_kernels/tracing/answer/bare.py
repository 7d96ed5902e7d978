"""Parameters that are used as a layer's weight and belong to no layer: bare weights.

Code may multiply by a parameter of its own, as nn.MultiheadAttention does by `in_proj_weight` and a
mixture of experts by slices of a three-dimensional `gate_up_proj`. The channels that such a weight
makes and takes lie along two dimensions of it; along others it is a stack of weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.notes.steps import Product


class BareWeight(NamedTuple):
    """A parameter that is used as a weight.

    Attributes:
        name: of its module where the parameter is that one's `weight`, else the parameter's.
        inputs, outputs: the dimensions of it along which these channels lie.
    """

    name: str
    inputs: int
    outputs: int


def bare_weight(
    record: Record,
    product: Product,
    modules: Mapping[str, nn.Module],
    known: Collection[str],
) -> BareWeight | None:
    """The bare weight of a product; None where a layer's is used, or one that is computed.

    Args:
        modules: dict(model.named_modules()).
        known: the names of the model's parameters.
    """
    own = f"{product.module}.weight".lstrip(".")
    if isinstance(modules.get(product.module), (nn.Linear, _ConvNd)) and not (
        # A parameter beside the layer's own, as a low-rank update has two.
        product.direct and product.weight != own and own in known
    ):
        return None
    outputs, inputs = (dimension_of(record, product, v) for v in (product.outputs, product.inputs))
    if outputs is None or inputs is None:
        return None
    return BareWeight(product.module if product.weight == own else product.weight, inputs, outputs)


def dimension_of(record: Record, product: Product, atoms: Vector) -> int | None:
    """The dimension of a product's weight that these atoms are of."""
    if not atoms.size or not atoms[0]:
        return None
    place = bisect_right(record.starts, int(atoms[0]), key=lambda start: start[0]) - 1
    start, name, dim, size = record.starts[place]
    return dim if name == product.weight and int(atoms[0]) < start + size else None
