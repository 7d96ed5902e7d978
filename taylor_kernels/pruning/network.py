"""The model as it shrinks: what is chosen is masked in it, and removed from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.pruning.blocks import BlockMasks, remove_blocks
from taylor_kernels.pruning.in_use import check_apart, take_over
from taylor_kernels.pruning.inventory import Inventory
from taylor_kernels.pruning.masks.masking import Masks
from taylor_kernels.pruning.masks.named_tensors import NamedTensors
from taylor_kernels.pruning.prunable import Prunable
from taylor_kernels.pruning.removing.optimizer_state import (
    Cuts,
    Steps,
    check_follows,
    optimizers_in,
)
from taylor_kernels.pruning.removing.removal import lookup, remove
from taylor_kernels.pruning.removing.ties import Ties
from taylor_kernels.shards import in_parts
from taylor_kernels.statistics import Layers, Statistic, bare_layer, is_layer
from taylor_kernels.statistics.hooks.sites import AT_MODULE
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.model.caches import modules_by_name, renew


class Network(Inventory):
    """A model from which units and blocks are masked and removed, with the optimizer's state.

    Attributes:
        in_use: its pruner is open and has not reached its targets.
    """

    def __init__(self, model: nn.Module, prunable: Prunable, optimizer: object) -> None:
        super().__init__(prunable)
        self.model = model
        self._optimizer = optimizer
        self._masks = Masks(model, optimizer)
        self._block_masks = BlockMasks(model)
        self._steps = Steps()
        names = dict.fromkeys(entry.tensor for group in self.first for entry in group.entries)
        self._tensors = NamedTensors(names)
        check_apart(self)
        self._shapes = self._found_shapes()
        self._ties = Ties(model, self._tensors.names, self._tensors.of(model))
        self._gated: dict[str, nn.Module] = {}  # modules at which gates are read
        # Of the channels as they are now, what would go with all units.
        self._all_cuts: tuple[Channels | None, Mapping[str, Cuts]] = None, {}
        self.in_use = True
        take_over(model, self)

    def cut(self) -> dict[str, Tensor]:
        """The tensors that units have entries in."""
        found = zip(self._tensors.names, self._tensors.of(self.model), strict=True)
        return {name: tensor for name, tensor in found if tensor is not None}

    def mask(
        self, taken: Sequence[Tensor], blocks: Sequence[int] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Mask units ([n] int64 per group) and blocks (their numbers) that the meter has counted as
        gone already. What goes with a masked block is looked at no more.

        Returns:
            Layer -> the filters that went, numbered as at first.
        """
        filters: dict[str, list[int]] = {}
        for first, left, dead, units in zip(
            self.first, self._left(), self.dead, taken, strict=True
        ):
            dead[units] = True
            for slot in first.producers if units.numel() else []:
                gone = slot.index[left.nonzero().flatten()[units]].flatten().tolist()
                filters.setdefault(slot.owner, []).extend(gone)
        if blocks:
            self._off[list(blocks)] = True
            self.channels = self.channels.leaving([self.blocks[number] for number in blocks])
        self._masks.set(self.channels, self.dead)
        self._set_block_masks()
        renew(modules_by_name(self.model).values())
        return {layer: tuple(sorted(gone)) for layer, gone in filters.items()}

    def zero_gradients(self) -> None:
        """See `Masks`."""
        self._masks.zero_gradients()

    def compact(self) -> list[Tensor]:
        """Remove what is masked; per group [U] bool, True for the units that went.

        Raises:
            ValueError: an optimizer's state cannot be cut. Nothing has changed.
        """
        blocks = self._masked_blocks()
        gone = self._remove(self.dead, self.channels, self._off)
        self._masks.clear()
        self._set_block_masks()
        if self._optimizer is None and (blocks or any(units.any() for units in gone)):
            warnings.warn(
                "compact() has put new parameters in place of those it cut: an optimizer made "
                "before holds the old ones and would not train the model; make a new one, or give "
                "Pruner(optimizer=...) yours",
                stacklevel=3,
            )
        return gone

    def _set_block_masks(self) -> None:
        self._block_masks.set(self._masked_blocks())

    def _remove(self, dead: list[Tensor], channels: Channels, blocks: Tensor) -> list[Tensor]:
        """Remove units of the groups of `channels`, and those blocks ([B] bool) that are there."""
        leaving = (blocks & ~self._removed).nonzero().flatten().tolist()
        if any(gone.any() for gone in dead) or leaving:
            if in_parts(self.model):
                raise ValueError(
                    "model: its parameters are in parts on several ranks and cannot be cut there; "
                    "save_checkpoint(), load it into the model as it was before fully_shard(), "
                    "compact() that, and shard it again"
                )
            self.check_unchanged()
            stepped = self._steps.optimizers
            remove(self.model, channels, dead, self._optimizer, stepped)
            remove_blocks(self.model, [self.blocks[n] for n in leaving], self._optimizer)
            self._removed = self._removed | blocks
            self.channels = channels.without(dead)
            self.dead = [old[~gone] for old, gone in zip(self.dead, dead, strict=True)]
            self._shapes = self._found_shapes()
            renew(modules_by_name(self.model).values())
        return dead

    def _found_shapes(self) -> list[torch.Size | None]:
        """The shapes of the tensors that units have entries in; None for those that are gone."""
        return [None if t is None else t.shape for t in self._tensors.of(self.model)]

    def layers(self, names: Iterable[str]) -> Layers:
        """Layers of these names as they are, bare weights among them."""
        modules, bare = modules_by_name(self.model), self._whole.bare
        found = {
            name: bare_layer(self.model, bare[name])
            if name in bare and not is_layer(modules.get(name))
            else modules[name]
            for name in names
        }
        return cast("Layers", found)

    def statistic(
        self, kind: type[Statistic], names: Sequence[str], backend: str | None
    ) -> Statistic:
        """A meter of that kind on these layers of the model as it is."""
        layers = self.layers(names)
        if not kind.at_gates:
            return kind(self.model, layers, backend)
        sites = find_gate_sites(self.channels, self.model, layers, gradients=kind.gradient_sites)
        modules = modules_by_name(self.model)
        self._gated = {s.module: modules[s.module] for s in sites.sites if s.how == AT_MODULE}
        return kind(self.model, layers, backend, sites)

    def use(self, optimizer: object) -> None:
        """Let another optimizer's state follow the masks.

        Those that it replaces may keep state of the parameters; they count as gone until one of
        them makes a step again.
        """
        self._steps.forget(set(optimizers_in(self._optimizer)).difference(optimizers_in(optimizer)))
        self._optimizer = self._masks.optimizer = optimizer

    def check_optimizer(self) -> None:
        """The optimizer's state can be masked and cut, whatever units go.

        Raises:
            ValueError: a state tensor has no dimensions of its parameter's.
        """
        optimizers = optimizers_in(self._optimizer)
        if self._all_cuts[0] is not self.channels:
            everything = [torch.ones_like(gone) for gone in self.dead]
            self._all_cuts = self.channels, self.channels.entries(everything)
        if not any(one.state for one in optimizers):
            return
        tensors = dict(zip(self._tensors.names, self._tensors.of(self.model), strict=True))
        for name, cuts in self._all_cuts[1].items():
            if (tensor := tensors.get(name)) is not None:  # else `check_unchanged` says so
                check_follows(optimizers, name, tensor, cuts)

    def check_unchanged(self) -> None:
        """Nobody else has cut the model.

        Raises:
            RuntimeError: somebody has.
        """
        found_shapes = self._found_shapes()
        if found_shapes == self._shapes:
            self._ties.check(self.model, self._tensors.of(self.model))
            return
        for name, shape, left in zip(self._tensors.names, found_shapes, self._shapes, strict=True):
            if shape != left:
                found = "is gone" if shape is None else f"has shape {tuple(shape)}"
                raise RuntimeError(
                    f"model: {name} {found}, where this pruner left one of "
                    f"{tuple(left or ())}: another Pruner, or other code, has cut the model or put "
                    "other modules into it since; close() this pruner and make a new one"
                )

    def check_held(self, layers: Layers) -> None:
        """The layers that are scored, and the modules at which they are, are the model's.

        Raises:
            RuntimeError: another module has taken the place of one.
        """
        now, bare = modules_by_name(self.model), self._whole.bare
        held = {n: layer for n, layer in layers.items() if n not in bare} | self._gated
        moved = [name for name, module in held.items() if now.get(name) is not module]
        if moved:
            raise RuntimeError(
                f"model: {', '.join(moved)}: other modules have been put there since this pruner "
                "was made, and the old ones are scored; close() it and make a new one after that"
            )

    def close(self) -> None:
        """Take the hooks off the model, for good; masked blocks go on to add zeros."""
        self.in_use = False
        self._masks.close()
        self._steps.close()

    def gone_after(self, blocks: Tensor) -> list[str]:
        """The names in the model's state that `restore` would remove with blocks ([B] bool)."""
        leaving = (blocks & ~self._removed).nonzero().flatten().tolist()
        names = self.model.state_dict()
        return [n for n in names if any(self.blocks[number].holds(n) for number in leaving)]

    def shapes_after(
        self, compacted: Sequence[Tensor], blocks: Tensor
    ) -> dict[str, tuple[int, ...]]:
        """The shapes that `restore` would give the tensors that it cuts."""
        cut: dict[int, tuple[int, ...]] = {}
        channels = self._cutting(blocks)
        for name, cuts in channels.entries(self.stale(compacted, blocks)).items():
            tensor = lookup(self.model, name)
            cut[id(tensor)] = tuple(
                size - cuts[dim].numel() if dim in cuts else size
                for dim, size in enumerate(tensor.shape)
            )
        tensors = self.model.state_dict(keep_vars=True)  # a shared one is in it several times
        return {name: cut[id(tensor)] for name, tensor in tensors.items() if id(tensor) in cut}

    def restore(
        self,
        removed: Sequence[Tensor],
        compacted: Sequence[Tensor],
        blocks_removed: Tensor,
        blocks_compacted: Tensor,
    ) -> None:
        """Take on a state: remove what it has removed, mask what it has masked, and no more."""
        stale, cutting = self.stale(compacted, blocks_compacted), self._cutting(blocks_compacted)
        self._remove(stale, cutting, blocks_compacted)
        self._off = blocks_removed.clone()
        left = self._left()
        self.channels = self._whole.without([~there for there in left]).leaving(self.blocks_off)
        self._masks.close()
        self.dead = [off[there] for there, off in zip(left, removed, strict=True)]
        self.meter.reset()
        for group, gone in zip(self.first, self._gone(), strict=True):
            self.meter.take(group, gone)
        for block in self.blocks_off:
            self.meter.leave(block)
        self._masks.set(self.channels, self.dead)
        self._set_block_masks()
