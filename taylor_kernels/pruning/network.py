"""The model as it shrinks: which units are masked, which are gone, and what is left."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.pruning.groups import Group
from taylor_kernels.pruning.masking import Masks
from taylor_kernels.pruning.optimizer_state import Steps, check_follows, optimizers_in
from taylor_kernels.pruning.prunable import Prunable
from taylor_kernels.pruning.removal import lookup, remove
from taylor_kernels.shards import is_sharded
from taylor_kernels.statistics import Layers, Statistic

#: Model -> the network of the last pruner that was made of it.
_LAST: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Network]] = weakref.WeakKeyDictionary()


def check_free(model: nn.Module) -> None:
    """No pruner of this model is in use.

    Raises:
        ValueError: one is.
    """
    last = _LAST.get(model)
    network = None if last is None else last()
    if network is not None and network.in_use:
        raise ValueError(
            "model: an earlier Pruner of it is open, whose filters this one would cut; close() "
            "that one first (compact() before, to remove what it has masked)"
        )


class Network:
    """A model with its coupled groups.

    Attributes:
        channels: as the model is now; `Group.classes` says which units are left.
        dead: per group [U] bool, True for units that are masked.
        meter: counts masked and removed units as gone.
        in_use: its pruner is open and has not reached its targets.
    """

    def __init__(self, model: nn.Module, prunable: Prunable, optimizer: object) -> None:
        self.model = model
        self.channels = prunable.channels
        self.dead = [torch.zeros(group.size, dtype=torch.bool) for group in prunable.groups]
        self.meter = prunable.meter
        self._first = prunable.groups
        self._original_widths = prunable.widths
        self._optimizer = optimizer
        self._masks = Masks(model, optimizer)
        self._steps = Steps()
        self._shapes = self._found_shapes()
        self.in_use = True
        _LAST[model] = weakref.ref(self)

    @property
    def groups(self) -> list[Group]:
        return cast("list[Group]", self.channels.groups)

    def mask(self, taken: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        """Mask units ([n] int64 per group) that the meter has counted as gone already.

        Returns:
            Layer -> the filters that went, numbered as at first.
        """
        filters: dict[str, list[int]] = {}
        for first, left, dead, units in zip(
            self._first, self._left(), self.dead, taken, strict=True
        ):
            dead[units] = True
            for slot in first.producers if units.numel() else []:
                gone = slot.index[left.nonzero().flatten()[units]].flatten().tolist()
                filters.setdefault(slot.owner, []).extend(gone)
        self._masks.set(self.channels, self.dead)
        return {layer: tuple(sorted(gone)) for layer, gone in filters.items()}

    def zero_gradients(self) -> None:
        """See `Masks`."""
        self._masks.zero_gradients()

    @property
    def first(self) -> list[Group]:
        """The groups as they were at first, which `state` is of."""
        return self._first

    def compact(self) -> list[Tensor]:
        """Remove what is masked; per group [U] bool, True for the units that went.

        Raises:
            ValueError: an optimizer's state cannot be cut. Nothing has changed.
        """
        gone = self._remove(self.dead)
        self._masks.close()
        if self._optimizer is None and any(units.any() for units in gone):
            warnings.warn(
                "compact() has put new parameters in place of those it cut: an optimizer made "
                "before holds the old ones and would not train the model; make a new one, or give "
                "Pruner(optimizer=...) yours",
                stacklevel=3,
            )
        return gone

    def _remove(self, dead: list[Tensor]) -> list[Tensor]:
        if any(gone.any() for gone in dead):
            if any(map(is_sharded, self.model.parameters())):
                raise ValueError(
                    "model: its parameters are in parts on several ranks and cannot be cut there; "
                    "save_checkpoint(), load it into the model as it was before fully_shard(), "
                    "compact() that, and shard it again"
                )
            self.check_unchanged()
            stepped = self._steps.optimizers
            remove(self.model, self.channels, dead, self._optimizer, stepped)
            self.channels = self.channels.without(dead)
            self.dead = [old[~gone] for old, gone in zip(self.dead, dead, strict=True)]
            self._shapes = self._found_shapes()
        return dead

    def _found_shapes(self) -> dict[str, torch.Size | None]:
        """The shapes of the tensors that units have entries in; None for those that are gone."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        names = dict.fromkeys(entry.tensor for group in self._first for entry in group.entries)
        return {name: tensors[name].shape if name in tensors else None for name in names}

    def statistic(
        self, kind: type[Statistic], names: Sequence[str], backend: str | None
    ) -> Statistic:
        """A meter of that kind on these layers of the model as it is."""
        modules = dict(self.model.named_modules())
        layers = cast("Layers", {name: modules[name] for name in names})
        if not kind.at_gates:
            return kind(self.model, layers, backend)
        sites = find_gate_sites(self.channels, self.model, layers)
        return kind(self.model, layers, backend, sites)

    def use(self, optimizer: object) -> None:
        """Let another optimizer's state follow the masks."""
        self._optimizer = self._masks.optimizer = optimizer

    def check_optimizer(self) -> None:
        """The optimizer's state can be masked and cut, whatever units go.

        Raises:
            ValueError: a state tensor has no dimensions of its parameter's.
        """
        optimizers = optimizers_in(self._optimizer)
        everything = [torch.ones_like(gone) for gone in self.dead]
        for name, cuts in self.channels.entries(everything).items():
            check_follows(optimizers, name, lookup(self.model, name), cuts)

    def check_unchanged(self) -> None:
        """Nobody else has cut the model.

        Raises:
            RuntimeError: somebody has.
        """
        for name, shape in self._found_shapes().items():
            if shape != self._shapes[name]:
                found = "is gone" if shape is None else f"has shape {tuple(shape)}"
                raise RuntimeError(
                    f"model: {name} {found}, where this pruner left one of "
                    f"{tuple(self._shapes[name] or ())}: another Pruner, or other code, has cut "
                    "the model since; close() this pruner and make a new one"
                )

    def close(self) -> None:
        """Take the hooks off the model, for good."""
        self.in_use = False
        self._masks.close()
        self._steps.close()

    @property
    def widths(self) -> dict[str, int]:
        """Layer -> filters left, masked ones not counted."""
        widths = dict(self._original_widths)
        for first, gone in zip(self._first, self._gone(), strict=True):
            for slot in first.producers:
                widths[slot.owner] -= gone * slot.index.size(1)
        return widths

    def _left(self) -> list[Tensor]:
        """Which units of each group, as it was at first, the model still has: [U] bool."""
        return [
            torch.isin(first.classes, group.classes)
            for first, group in zip(self._first, self.groups, strict=True)
        ]

    def _gone(self) -> list[int]:
        """Units of each group that are masked or removed."""
        return [
            first.size - group.size + int(dead.sum())
            for first, group, dead in zip(self._first, self.groups, self.dead, strict=True)
        ]

    def state(self) -> dict[str, list[Tensor]]:
        """Masks over the units as they were at first: "removed" in any way, and "compacted"."""
        removed, compacted = [], []
        for left, dead in zip(self._left(), self.dead, strict=True):
            compacted.append(~left)
            off = ~left
            off[left] = dead
            removed.append(off)
        return {"removed": removed, "compacted": compacted}

    def stale(self, compacted: Sequence[Tensor]) -> list[Tensor]:
        """Which present units a state has removed from the model: [U] bool per group.

        Raises:
            ValueError: the model has lost units that the state still has.
        """
        for own, theirs in zip(self.state()["compacted"], compacted, strict=True):
            if (own & ~theirs).any():
                raise ValueError(
                    "state: it holds filters that have been removed from this model; load it into "
                    "a pruner of the model as it was at first"
                )
        return [gone[left] for left, gone in zip(self._left(), compacted, strict=True)]

    def shapes_after(self, compacted: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that `restore` would give the tensors that it cuts."""
        cut: dict[int, tuple[int, ...]] = {}
        for name, cuts in self.channels.entries(self.stale(compacted)).items():
            tensor = lookup(self.model, name)
            cut[id(tensor)] = tuple(
                size - cuts[dim].numel() if dim in cuts else size
                for dim, size in enumerate(tensor.shape)
            )
        tensors = self.model.state_dict(keep_vars=True)  # a shared one is in it several times
        return {name: cut[id(tensor)] for name, tensor in tensors.items() if id(tensor) in cut}

    def restore(self, removed: Sequence[Tensor], compacted: Sequence[Tensor]) -> None:
        """Take on a state: remove what it has removed, mask what it has masked, and no more."""
        stale, before = self.stale(compacted), self._gone()
        self._remove(stale)
        self._masks.close()
        self.dead = [off[left] for left, off in zip(self._left(), removed, strict=True)]
        for group, old, new in zip(self.groups, before, self._gone(), strict=True):
            self.meter.take(group, new - old)
        self._masks.set(self.channels, self.dead)
