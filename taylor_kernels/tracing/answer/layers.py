"""The layers of a trace: which weights ran, and the classes of what each takes and makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.tracing.answer.bare import BareWeight, bare_weight, dimension_of
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.notes.steps import Product


@dataclass
class Layers:
    """What ran as a layer, by the layer's name.

    Attributes:
        sides: the classes of its input and output channels, as the layer counts them.
        bare: as `Channels.bare`.
        outside: as `Channels.outside`.
        macs: as `Channels.macs`, by parameter.
        input_dims: as `Channels.input_dims`.
        order: each name's place in the model.
    """

    order: dict[str, int]
    sides: dict[str, tuple[Vector, Vector]] = field(default_factory=dict)
    bare: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    input_dims: dict[str, int] = field(default_factory=dict)

    def place(self, name: str) -> int:
        """Where in the model a layer is; in front of all others where nothing says so."""
        return self.order.get(name, -1)


def find_layers(
    record: Record,
    label: Vector,
    dims: Mapping[tuple[str, int], Vector],
    modules: Mapping[str, nn.Module],
    parameters: Collection[str],
) -> Layers:
    """The layers that a run multiplied with.

    Args:
        label: the class of each atom.
        dims: (parameter or buffer, dimension) -> the classes along it.
        modules: dict(model.named_modules()).
        parameters: the names of the model's.
    """
    layers = Layers({name: number for number, name in enumerate(modules)})
    layers.input_dims = _input_dims(record, label, dims, parameters)
    nothing = np.zeros(0, np.int64)
    for product in record.products:
        bare = bare_weight(record, product, modules, parameters)
        name = product.module if bare is None else bare.name
        layers.macs[product.weight] = layers.macs.get(product.weight, 0) + product.macs
        if not _fits(product, bare, modules.get(product.module), dims, label):
            continue
        if name in layers.sides:
            pass
        elif bare is None:
            layers.sides[name] = (
                _whole(record, product, product.inputs, dims, label),
                _whole(record, product, product.outputs, dims, label),
            )
        else:
            layers.sides[name] = (
                dims[product.weight, bare.inputs],
                dims[product.weight, bare.outputs],
            )
            layers.bare[name] = ((product.weight, bare.outputs),)
            layers.order.setdefault(name, layers.place(product.module))
        if product.caller != product.module:
            layers.outside[name] = product.caller
    for mixture in record.mixtures:
        layers.sides[mixture.experts] = nothing, label[mixture.atoms]
        layers.bare[mixture.experts] = tuple((part, 0) for part in mixture.parts)
    # A layer that ran, and whose weight was none of the model's tensors.
    for name, module in modules.items():
        if name in record.ran and isinstance(module, (nn.Linear, _ConvNd)):
            layers.sides.setdefault(name, (nothing, nothing))
    return layers


def _fits(
    product: Product,
    bare: BareWeight | None,
    module: nn.Module | None,
    dims: Mapping[tuple[str, int], Vector],
    label: Vector,
) -> bool:
    """Whether a product that belongs to a layer is by its weight, or by one beside it, and not of
    two parts of an update of low rank (LoRA) that the layer adds to its weight, nor one by which a
    parametrization works the weight out (`orthogonal`)."""
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return True
    if bare is not None:
        read = dims.get((f"{product.module}.weight".lstrip("."), 1))
        return read is None or not np.array_equal(label[product.outputs], read)
    own = product.weight.removeprefix(f"{product.module}.").removeprefix("parametrizations.")
    sizes = product.inputs.size, product.outputs.size
    if own in ("weight", "weight_v", "weight_orig"):  # the last two are those of old hooks
        return True
    if isinstance(module, nn.Linear):
        return sizes == (module.in_features, module.out_features)
    return sizes in _sizes_of(module)


def _whole(
    record: Record,
    product: Product,
    atoms: Vector,
    dims: Mapping[tuple[str, int], Vector],
    label: Vector,
) -> Vector:
    """The classes of one side of a layer: those of the whole weight where a product is by a slice
    of it, as in networks that run at several widths."""
    dim = dimension_of(record, product, atoms)
    whole = None if dim is None else dims.get((product.weight, dim))
    return label[atoms] if whole is None or whole.size <= atoms.size else whole


def _sizes_of(module: _ConvNd) -> set[tuple[int, int]]:
    """How many inputs and outputs a convolution's product may be of: of all groups, or of each."""
    whole, groups = (module.in_channels, module.out_channels), module.groups
    each = module.in_channels // groups, module.out_channels // groups
    return {whole, (each[0], whole[1]), (whole[0], each[1])}


def _input_dims(
    record: Record,
    label: Vector,
    dims: Mapping[tuple[str, int], Vector],
    parameters: Collection[str],
) -> dict[str, int]:
    own: dict[str, list[Vector]] = {name: [] for name in parameters}
    for (name, _), vector in dims.items():  # a tensor's dimensions, in their order
        if name in own:
            own[name].append(vector)
    found: dict[str, set[int]] = {}
    for product in record.products:
        if not product.direct:
            found[product.weight] = set()
        read, vectors = label[product.inputs], own.get(product.weight, [])
        along = {
            d - len(vectors)
            for d, vector in enumerate(vectors)
            if vector.size == read.size and (vector == read).all()
        }
        found[product.weight] = found.get(product.weight, along) & along
    return {name: along.pop() for name, along in found.items() if len(along) == 1}
