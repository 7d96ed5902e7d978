"""What SPP takes away: columns of a layer's weight, or filters that go together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from taylor_kernels.statistics.layers import filter_groups
from taylor_kernels.tracing import IN, Channels
from taylor_kernels.tracing.answer.units import Group, Slot

#: What has columns: a convolution that is not transposed, or a linear layer.
Layer: TypeAlias = nn.Linear | _ConvNd


class Switched(ABC):
    """The groups of one layer, or of several that are coupled, each switched off as one.

    Attributes:
        name: of the layer that names them.
        count: how many there are, n.
    """

    name: str
    count: int

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Those that `scale` changes."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Σ|w| of each group, [n] float32 or wider."""

    @abstractmethod
    def scale(self, factors: Tensor) -> None:
        """Multiply the groups by [n] factors; 0 makes a 0 of anything."""

    @abstractmethod
    def erase(self, masked: Tensor, *, gradients: bool = False) -> None:
        """Zero the groups that are True in [n] bool, or their gradients."""


class Columns(Switched):
    """The columns of a layer's lowered weight: an input channel at one kernel position, each.

    A weight [O, I/g, *k] of g groups is g matrices [O/g, I/g·k]. Their columns, I·k in all, are
    numbered one matrix after the other. A linear layer has a column for each input.
    """

    def __init__(self, name: str, layer: Layer) -> None:
        self.name, self.layer, self.groups = name, layer, filter_groups(layer)
        weight = layer.weight
        self.count = weight.numel() // (weight.size(0) // self.groups)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.layer.weight]

    def scores(self) -> Tensor:
        """[C] float: Σ|w| of each column."""
        # One pass over the weight, and nothing of its size is made.
        weight = self._columns(self.layer.weight.detach())
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, 1, dim=1, dtype=wide).flatten()

    def scale(self, factors: Tensor) -> None:
        weight = self.layer.weight.data
        factors = self._spread(factors, weight)
        weight.mul_(factors).masked_fill_(factors == 0, 0)

    def erase(self, masked: Tensor, *, gradients: bool = False) -> None:
        values = self.layer.weight.grad if gradients else self.layer.weight.data
        if values is not None:
            values.masked_fill_(self._spread(masked, values), 0)

    def _columns(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.size(0) // self.groups, -1)

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        """[count] for the columns -> [O, I/g, *k], in steps of 0 where the group is one."""
        values = values.to(like.dtype) if values.dtype != torch.bool else values
        per_group = values.view(self.groups, 1, *like.shape[1:])
        rows = per_group.expand(-1, like.size(0) // self.groups, *like.shape[1:])
        return rows.reshape(like.shape) if self.groups > 1 else rows[0]


class Units(Switched):
    """Filters that go together: the units of a traced group, switched where they are read.

    A unit's gate stands on the columns that read it, so that one factor switches off all that the
    coupled filters hand on, norms behind them included.
    """

    def __init__(self, number: int, group: Group, model: nn.Module) -> None:
        self.number, self.name = number, group.name
        self._readers = [(layer_of(model, s.owner), s.index) for s in readers(group, model)]
        self._producers = [(layer_of(model, s.owner), s.index) for s in group.producers]
        self.count = group.size

    @property
    def parameters(self) -> list[Tensor]:
        return list({id(layer.weight): layer.weight for layer, _ in self._readers}.values())

    def scores(self) -> Tensor:
        """[U] float: Σ|w| of the filters of each unit."""
        return torch.stack([_filter_norms(*each) for each in self._producers]).sum(0)

    def scale(self, factors: Tensor) -> None:
        for layer, index in self._readers:
            weight = layer.weight.data
            per_channel = torch.ones(channels_in(layer), dtype=weight.dtype, device=weight.device)
            per_channel[index.to(weight.device)] = factors.to(weight.dtype)[:, None]
            spread = _of_inputs(layer, per_channel)
            weight.mul_(spread).masked_fill_(spread == 0, 0)

    def erase(self, masked: Tensor, *, gradients: bool = False) -> None:
        for layer, index in self._readers:
            values = layer.weight.grad if gradients else layer.weight.data
            if values is not None:
                off = torch.zeros(channels_in(layer), dtype=torch.bool, device=values.device)
                off[index.to(values.device)] = masked[:, None]
                values.masked_fill_(_of_inputs(layer, off), 0)


def column_layers(model: nn.Module, layers: Iterable[str] | None) -> list[Columns]:
    """The layers by name; by default every convolution whose columns have more than one weight.

    Raises:
        ValueError: no such layer, or one without columns.
    """
    modules = dict(model.named_modules())
    if layers is None:
        found = [
            Columns(name, module)
            for name, module in modules.items()
            if _has_columns(module) and isinstance(module, _ConvNd) and _tall(module)
        ]
        if not found:
            raise ValueError(
                "model: it has no convolution whose columns could go; name linear layers in layers="
            )
        return found
    layers = list(layers)
    if not layers:
        raise ValueError("layers: it names none; leave it out for all convolutions")
    for name in layers:
        if name not in modules:
            raise ValueError(f"layers: the model has no module {name!r}")
        if not _has_columns(modules[name]):
            raise ValueError(
                f"layers: {name!r} is a {type(modules[name]).__name__}; columns are those of a "
                "convolution, not transposed, or a linear layer"
            )
    return [Columns(name, layer_of(model, name)) for name in layers]


def unit_groups(model: nn.Module, channels: Channels, layers: Iterable[str] | None) -> list[Units]:
    """The traced groups whose units are read by layers alone, or those that `layers` write.

    Raises:
        ValueError: a layer whose filters have to stay, with the reason.
    """
    wanted = None if layers is None else set(layers)
    found: list[Units] = []
    offered: set[str] = set()
    for number, group in enumerate(channels.groups):
        owners = {slot.owner for slot in group.producers}
        switched = bool(readers(group, model)) and all(
            _has_columns(model.get_submodule(name)) for name in owners
        )
        if switched:
            offered |= owners
            if wanted is None or owners & wanted:
                found.append(Units(number, group, model))
    for name in sorted((wanted or set()) - offered):
        reason = channels.skipped.get(name, "no traced group of filters is written by it alone")
        raise ValueError(f"layers: the filters of {name!r} stay: {reason}")
    if not found:
        raise ValueError("model: no filters of it can go; see tk.trace(model, example_inputs)")
    return found


def readers(group: Group, model: nn.Module) -> list[Slot]:
    """The layers that read a group's channels; none if something reads them that is no layer's.

    A depthwise convolution hands its channels on and is not among them.
    """
    inputs = [slot for slot in group.slots if slot.side == IN]
    modules = dict(model.named_modules())  # a weight that no layer holds is none of these
    found = [slot for slot in inputs if not _is_depthwise(modules.get(slot.owner))]
    fine = all(_has_columns(modules.get(slot.owner)) for slot in found)
    return found if fine else []


def channels_in(layer: Layer) -> int:
    """How many input channels a layer reads, over all its groups."""
    return layer.weight.size(1) * filter_groups(layer)


def _of_inputs(layer: Layer, values: Tensor) -> Tensor:
    """[I] of a layer's input channels -> what broadcasts against its weight [O, I/g, *k]."""
    weight = layer.weight
    rows = values.view(-1, 1, weight.size(1)).expand(-1, weight.size(0) // filter_groups(layer), -1)
    return rows.reshape(weight.size(0), weight.size(1), *[1] * (weight.dim() - 2))


def read_channels(layer: Layer) -> Tensor:
    """[I] bool: the input channels that some weight of the layer reads."""
    weight = layer.weight.detach()
    by_group = weight.reshape(
        filter_groups(layer), -1, weight.size(1), max(weight[0, 0].numel(), 1)
    )
    return (by_group != 0).any(3).any(1).flatten()


def layer_of(model: nn.Module, name: str) -> Layer:
    """The layer of that name, which has columns or is linear."""
    module = model.get_submodule(name)
    assert _has_columns(module)
    return module


def _has_columns(module: nn.Module | None) -> TypeGuard[Layer]:
    plain = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    layer = module if plain or isinstance(module, nn.Linear) else None
    return layer is not None and "weight" in layer._parameters


def _tall(layer: _ConvNd) -> bool:
    return layer.out_channels > layer.groups


def _is_depthwise(module: nn.Module | None) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and module.weight.size(1) == 1


def _filter_norms(layer: Layer, index: Tensor) -> Tensor:
    weight = layer.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weight.flatten(1), 1, dim=1, dtype=wide)
    return norms[index.to(weight.device)].sum(1)
