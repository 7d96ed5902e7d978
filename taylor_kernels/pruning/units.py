"""Coupled groups as plain data: which slices of which tensors one unit of a group owns.

A unit is what is removed together: one index of every layer that a skip connection, concatenation,
grouped or depthwise convolution ties to each other. Everything here speaks in names, so that it
holds for a model and for its copies alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

OUT, IN, BOTH = "out", "in", "both"


@dataclass(frozen=True)
class Slot:
    """One side of a module (or a bare parameter) that holds channels of a group's units.

    Attributes:
        owner: module name; the full name of the parameter for a bare one.
        side: OUT for output channels, IN for input channels, BOTH where they are the same thing
            (BatchNorm, depthwise convolution), "dim k" for dimension k of a bare parameter.
        index: [U, m] int64, the m channels of each unit, ascending.
        producer: these are output filters of a convolution or linear layer, and are scored.
    """

    owner: str
    side: str
    index: Tensor
    producer: bool


@dataclass(frozen=True)
class Axis:
    """The entries `index` ([U, m] int64) along `dim` of a parameter or buffer, one row per unit."""

    tensor: str
    dim: int
    index: Tensor
    fill: float = 0.0  # what a masked entry holds


@dataclass(frozen=True)
class Group:
    """Units of one kind, in the order of their channels.

    Attributes:
        slots: the sides of modules that hold the units' channels; `Slot.index` has a row per unit.
        axes: the slices of parameters and buffers that go with a unit.
        units: [U] int64, the number of each unit in the group as it was at first.
        multiple: so many units go together; the units that remain are a multiple of it, or all of
            those there were.
        minimum: so many remain at least.
    """

    slots: tuple[Slot, ...]
    axes: tuple[Axis, ...]
    units: Tensor
    multiple: int = 1
    minimum: int = 1

    @property
    def name(self) -> str:
        """The layer that names the group in messages."""
        return self.producers[0].owner

    @property
    def size(self) -> int:
        return self.units.numel()

    @property
    def producers(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.producer]

    @property
    def filters_per_unit(self) -> int:
        return sum(slot.index.size(1) for slot in self.producers)

    def next_to_go(self, alive: int) -> int:
        """How many units go next where `alive` are left; 0 at the minimum."""
        count = alive % self.multiple or self.multiple
        return count if alive - count >= self.minimum else 0

    def most_removable(self, alive: int) -> int:
        """How many of the `alive` units go at most."""
        first = self.next_to_go(alive)
        if not first:
            return 0
        return first + (alive - first - self.minimum) // self.multiple * self.multiple


def removed_channels(
    groups: Sequence[Group], dead: Sequence[Tensor]
) -> dict[tuple[str, str], Tensor]:
    """The channels, [n] ascending, that go from each (owner, side).

    Args:
        dead: per group [U] bool, True for units to remove.
    """
    found: dict[tuple[str, str], list[Tensor]] = {}
    for group, gone in zip(groups, dead, strict=True):
        if gone.any():
            for slot in group.slots:
                found.setdefault((slot.owner, slot.side), []).append(slot.index[gone].flatten())
    return {key: torch.cat(parts).unique() for key, parts in found.items()}


def removed_entries(groups: Sequence[Group], dead: Sequence[Tensor]) -> dict[str, dict[int, Axis]]:
    """Tensor name -> dim -> the entries that go, as an `Axis` whose index is [n] ascending."""
    found: dict[str, dict[int, list[Axis]]] = {}
    for group, gone in zip(groups, dead, strict=True):
        if gone.any():
            for axis in group.axes:
                part = replace(axis, index=axis.index[gone].flatten())
                found.setdefault(axis.tensor, {}).setdefault(axis.dim, []).append(part)
    return {
        tensor: {
            dim: replace(parts[0], index=torch.cat([part.index for part in parts]).unique())
            for dim, parts in dims.items()
        }
        for tensor, dims in found.items()
    }


def renumber(groups: Sequence[Group], dead: Sequence[Tensor]) -> list[Group]:
    """The groups as they are once the dead units have been removed from the model."""
    channels = removed_channels(groups, dead)
    entries = removed_entries(groups, dead)
    renumbered = []
    for group, gone in zip(groups, dead, strict=True):
        slots, axes = [], []
        for slot in group.slots:
            cut_here = channels.get((slot.owner, slot.side))
            slots.append(replace(slot, index=_closed_up(slot.index[~gone], cut_here)))
        for axis in group.axes:
            cut = entries.get(axis.tensor, {}).get(axis.dim)
            index = _closed_up(axis.index[~gone], None if cut is None else cut.index)
            axes.append(replace(axis, index=index))
        units = group.units[~gone]
        renumbered.append(replace(group, slots=tuple(slots), axes=tuple(axes), units=units))
    return renumbered


def _closed_up(index: Tensor, removed: Tensor | None) -> Tensor:
    """Indices after the `removed` ones (ascending) are gone."""
    return index if removed is None else index - torch.searchsorted(removed, index)


def axes_of(model_modules: Mapping[str, nn.Module], slot: Slot) -> list[Axis]:
    """The parameter and buffer slices that a slot's units own."""
    if slot.side.startswith("dim "):
        return [Axis(slot.owner, int(slot.side.removeprefix("dim ")), slot.index)]
    module = model_modules[slot.owner]
    axes: list[tuple[str, int, Tensor, float]] = []
    if isinstance(module, _ConvNd) and slot.side != BOTH:
        dim = int(slot.side == IN) ^ int(module.transposed)
        # The second dimension of a convolution's weight counts within one group.
        index = slot.index
        if dim == 1 and module.groups > 1:
            index = _within_group(index, module.weight.size(1))
        axes.append(("weight", dim, index, 0.0))
    elif isinstance(module, nn.Linear):
        axes.append(("weight", int(slot.side == IN), slot.index, 0.0))
    elif isinstance(module, nn.Embedding):
        axes.append(("weight", 1, slot.index, 0.0))
    else:
        axes.append(("weight", 0, slot.index, 0.0))
    if slot.side != IN and not isinstance(module, nn.Embedding):
        axes.append(("bias", 0, slot.index, 0.0))
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        axes.append(("running_mean", 0, slot.index, 0.0))
        axes.append(("running_var", 0, slot.index, 1.0))
    prefix = f"{slot.owner}." if slot.owner else ""
    return [
        Axis(prefix + name, dim, index, fill)
        for name, dim, index, fill in axes
        if getattr(module, name, None) is not None
    ]


def _within_group(index: Tensor, per_group: int) -> Tensor:
    """Channels [U, m] as positions within a group: a unit holds the same ones of every group."""
    return torch.stack([row.unique() for row in index % per_group])
