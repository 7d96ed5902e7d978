"""Masks that are really off and stay off, until they are removed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from taylor_kernels.hooks import Hook, forget_compiled, remove_all
from taylor_kernels.pruning.masks.called_norms import KeptCalls
from taylor_kernels.pruning.masks.held_entries import (
    HeldEntries,
    fill_once,
    fills,
    zeroes_gradients,
)
from taylor_kernels.pruning.masks.kept_experts import KeptExperts
from taylor_kernels.pruning.masks.kept_norms import OnKept, keep_only
from taylor_kernels.pruning.masks.named_tensors import NamedTensors
from taylor_kernels.pruning.removing.optimizer_state import masked_state, optimizers_in
from taylor_kernels.pruning.removing.removal import Tensors, lookup
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.model.caches import modules_by_name
from taylor_kernels.tracing.multihead import unpack_examples


class Masks:
    """The dead units of a model, held at zero.

    Everything that removal would take is zero (running variances one): producers' filters, the
    norms and parameters behind them, consumers' input columns, their gradients and the
    optimizer's state. Gradients are zeroed as they arrive; tensors are written again around every
    forward pass of the model and after every step of an optimizer, which undoes what momentum did
    to them; a model that was compiled before shows its passes to no hook. Norms across channels are
    run on what is kept (`OnKept`). The hooks outlive the pruner. In a copy of the model the units
    are plain zeros, and only its norms still know of them; its state_dict says nothing of that.

    On the CPU the write before a forward pass is spared where that behind the last step of an
    optimizer of these parameters seems to hold: the tensors are the same, in the same memory that
    no other process shares, their versions (`_version`) have not moved, and an entry of every
    masked index is as it was left, another one each time. A write that moves no version, through
    `.data`, numpy, an address or a fused kernel called by itself, is seen if it changes all of a
    masked filter, or one that is looked at; biases and statistics are looked at whole. If it
    changes a few entries of weights, as one row of an embedding whose columns are masked, these may
    stay until the next step.
    """

    def __init__(self, model: nn.Module, optimizer: object) -> None:
        self._model = model
        self.optimizer = optimizer
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._norms: list[torch.utils.hooks.RemovableHandle] = []
        self._zeroing: dict[str, Callable[[Tensor], None]] = {}
        # One hook is on all optimizers, and would outlive the model.
        weakref.finalize(model, remove_all, self._hooks)

    def set(self, channels: Channels, dead: Sequence[Tensor]) -> None:
        """Mask exactly the dead units ([U] bool per group); what was masked before stays zero."""
        self.clear()
        entries = channels.entries(dead)
        if not entries:
            return
        if plain := [name for name in entries if not _is_registered(self._model, name)]:
            Tensors(modules_by_name(self._model)).own_plain(plain)
        way = NamedTensors(entries)
        tensors = {
            name: lookup(self._model, name) if tensor is None else tensor  # or an error
            for name, tensor in zip(entries, way.of(self._model), strict=True)
        }
        masked = fills(tensors, channels, entries)
        parameters = {
            n: tensor for n, tensor in tensors.items() if isinstance(tensor, nn.Parameter)
        }
        held = HeldEntries(masked, way)
        held.write(self._model)
        zeroing = held.zeroing()
        self._zeroing = {name: zeroing[name] for name in parameters}
        for name, parameter in parameters.items():
            self._zeroing[name](parameter)
            if parameter.requires_grad:
                hook = self._zeroing[name]
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        optimizers = optimizers_in(self.optimizer)
        states = [
            state
            for name, parameter in parameters.items()
            for state in masked_state(optimizers, name, parameter, entries[name])
        ]
        fill_once(
            [state for state, _ in states],
            [[(dim, index, 0.0) for dim, index in cuts.items()] for _, cuts in states],
        )
        self._hooks.append(self._model.register_forward_pre_hook(Hook(_write, held)))
        # Training moves a masked channel's variance off one; it is put back at once.
        statistics = {name: parts for name, parts in masked.items() if name not in parameters}
        if statistics:
            after = Hook(_write, HeldEntries(statistics))
            self._hooks.append(self._model.register_forward_hook(after))
        mine = frozenset(map(id, parameters.values()))
        masked_here = _Masked(weakref.ref(self._model), held, get_ident(), mine)
        self._hooks.append(register_optimizer_step_post_hook(Hook(_write_after_step, masked_here)))
        modules = modules_by_name(self._model)
        attributes = channels.attributes(dead)
        for name in (*channels.kept_by_norms(dead), *attributes):
            unpack_examples(modules, name)
        self._norms = keep_only(modules, channels, dead, attributes)
        if self._norms:
            forget_compiled()

    def zero_gradients(self) -> None:
        """Zero the masked entries of gradients again, where others write them after backward().

        DistributedDataParallel averages what was there before they were zeroed as they came.
        """
        for name, zero in self._zeroing.items():
            zero(lookup(self._model, name))

    def close(self) -> None:
        """Take the hooks off that hold the values, which stay; norms go on as they were."""
        remove_all(self._hooks)
        self._hooks.clear()
        self._zeroing = {}

    def clear(self) -> None:
        """Take all hooks off: what was masked has been removed, or will be masked anew."""
        self.close()
        if self._norms:
            remove_all(self._norms)
            forget_compiled()
        self._norms = []


def _is_registered(model: nn.Module, name: str) -> bool:
    """Whether a tensor is a parameter or buffer, and no plain attribute."""
    *path, leaf = name.split(".")
    for part in path:
        model = model._modules[part]  # type: ignore[assignment]
    return leaf in model._parameters or leaf in model._buffers


def _write(held: HeldEntries, model: nn.Module, *_: object) -> None:
    """Write masked entries, before or after a forward pass, unless they seem to be there."""
    held.write(model, look=True)


class _Masked(NamedTuple):
    """What the hook behind steps of optimizers is told.

    Attributes:
        thread: in which the entries were masked.
        parameters: the ids of those that hold some.
    """

    model: weakref.ref[nn.Module]
    held: HeldEntries
    thread: int
    parameters: frozenset[int]

    def steps_with(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds masked parameters."""
        return any(
            id(parameter) in self.parameters
            for group in optimizer.param_groups
            for parameter in group["params"]
        )


def _write_after_step(masked: _Masked, optimizer: torch.optim.Optimizer, *_: object) -> None:
    # Any may step copies of parameters, which are copied back later. But one of another thread
    # steps another model, unless it holds masked parameters: this one may be losing them meanwhile.
    steps = masked.steps_with(optimizer)
    if (steps or masked.thread == get_ident()) and (alive := masked.model()) is not None:
        masked.held.write(alive, last=steps)


def check_unmasked(model: nn.Module) -> None:
    """No pruner holds filters of this model, or of a part of it, at zero.

    Raises:
        ValueError: one does, or has done so and left norms that are run on the other channels.
    """
    for name, module in model.named_modules():
        hooks_behind = module._forward_hooks.values()
        kept = [hook for hook in hooks_behind if isinstance(hook, (OnKept, KeptCalls, KeptExperts))]
        if kept:
            what = "router" if isinstance(kept[0], KeptExperts) else "norm"
            raise ValueError(
                f"model: its {what} {name!r} is run on the channels that an earlier Pruner has "
                "kept; compact() with that one first. A copy of such a model cannot be pruned: "
                "compact() the one it is a copy of, and copy that"
            )
    hooks: list[object] = [
        hook for module in model.modules() for hook in module._forward_pre_hooks.values()
    ]
    for parameter in model.parameters():
        hooks += (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    if any(
        zeroes_gradients(hook) or (isinstance(hook, Hook) and hook.calls(_write)) for hook in hooks
    ):
        raise ValueError(
            "model: an earlier Pruner holds filters of it at zero; call compact() or close() of "
            "that one first, or go on with copy.deepcopy(model), where they are plain zeros"
        )
