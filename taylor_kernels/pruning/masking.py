"""Masks that are really off and stay off, until they are removed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from taylor_kernels.hooks import Hook, forget_compiled, remove_all
from taylor_kernels.pruning.kept_norms import KeptExperts, KeptOnly, keep_only
from taylor_kernels.pruning.optimizer_state import Cuts, optimizers_in, zero_state
from taylor_kernels.pruning.removal import Tensors, lookup
from taylor_kernels.shards import fill_part
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.multihead import unpack_examples

#: (dimension, indices, value) of the entries that are masked, in the order in which to write them.
Fills = list[tuple[int, Tensor, float]]


class Masks:
    """The dead units of a model, held at zero.

    Everything that removal would take is zero (running variances one): producers' filters, the
    norms and parameters behind them, consumers' input columns, their gradients and the
    optimizer's state. Gradients are zeroed as they arrive; tensors are written again around every
    forward pass of the model and after every step of an optimizer, which undoes what momentum did
    to them; a model that was compiled before shows its passes to no hook. Norms across channels are
    run on what is kept (`KeptOnly`). The hooks outlive the pruner. In a copy of the model the units
    are plain zeros, and only its norms still know of them; its state_dict says nothing of that.
    """

    def __init__(self, model: nn.Module, optimizer: object) -> None:
        self._model = model
        self.optimizer = optimizer
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._norms: list[torch.utils.hooks.RemovableHandle] = []
        self._masked: dict[str, Fills] = {}
        # One hook is on all optimizers, and would outlive the model.
        weakref.finalize(model, remove_all, self._hooks)

    def set(self, channels: Channels, dead: Sequence[Tensor]) -> None:
        """Mask exactly the dead units ([U] bool per group); what was masked before stays zero."""
        self.clear()
        entries = channels.entries(dead)
        if not entries:
            return
        tensors, optimizers = Tensors(self._model), optimizers_in(self.optimizer)
        masked = fills(tensors, channels, entries)
        parameters = {
            name: tensors[name] for name in masked if isinstance(tensors[name], nn.Parameter)
        }
        _write(masked, self._model)
        self._masked = {name: masked[name] for name in parameters}
        for name, parameter in parameters.items():
            zero = Hook(_zero_grad, masked[name])
            zero(parameter)
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(zero))
            zero_state(optimizers, name, parameter, entries[name])
        statistics = {name: parts for name, parts in masked.items() if name not in parameters}
        self._hooks.append(self._model.register_forward_pre_hook(Hook(_write, masked)))
        # Training moves a masked channel's variance off one; it is put back at once.
        self._hooks.append(self._model.register_forward_hook(Hook(_write, statistics)))
        after_step = Hook(_write_after_step, weakref.ref(self._model), masked)
        self._hooks.append(register_optimizer_step_post_hook(after_step))
        modules = dict(self._model.named_modules())
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
        for name, parts in self._masked.items():
            _zero_grad(parts, lookup(self._model, name))

    def close(self) -> None:
        """Take the hooks off that hold the values, which stay; norms go on as they were."""
        remove_all(self._hooks)
        self._hooks.clear()
        self._masked = {}

    def clear(self) -> None:
        """Take all hooks off: what was masked has been removed, or will be masked anew."""
        self.close()
        if self._norms:
            remove_all(self._norms)
            forget_compiled()
        self._norms = []


def fills(tensors: Tensors, channels: Channels, entries: Mapping[str, Cuts]) -> dict[str, Fills]:
    """What masks these entries: parameter or buffer -> what to write; indices where it is."""
    found = {}
    for name, cuts in entries.items():
        values, device = channels.fills.get(name, {}), tensors[name].device
        parts = [(dim, index.to(device), values.get(dim, 0.0)) for dim, index in cuts.items()]
        found[name] = sorted(parts, key=lambda part: part[2] == 0)
    return found


def fill(tensor: Tensor, parts: Fills) -> None:
    for dim, index, value in parts:
        fill_part(tensor, dim, index.to(tensor.device), value)  # a trainer may have moved the model


def _zero_grad(parts: Fills, parameter: Tensor) -> None:
    """Zero the masked entries of a parameter's gradient."""
    if parameter.grad is not None and parameter.grad.layout == torch.strided:
        fill(parameter.grad.data, [(dim, index, 0.0) for dim, index, _ in parts])


def _write(masked: Mapping[str, Fills], model: nn.Module, *_: object) -> None:
    """Write masked entries, before or after a forward pass."""
    for name, parts in masked.items():
        # .data: a forward pass may lie between another one and its backward pass, and the values
        # that are written are the ones that were there.
        fill(lookup(model, name).data, parts)


def _write_after_step(
    model: weakref.ref[nn.Module], masked: Mapping[str, Fills], *_: object
) -> None:
    """Write masked entries after a step of any optimizer."""
    if (alive := model()) is not None:
        _write(masked, alive)


def check_unmasked(model: nn.Module) -> None:
    """No pruner holds filters of this model, or of a part of it, at zero.

    Raises:
        ValueError: one does, or has done so and left norms that are run on the other channels.
    """
    for name, module in model.named_modules():
        kept = [hook for hook in module._forward_hooks.values() if isinstance(hook, KeptOnly)]
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
        isinstance(hook, Hook) and (hook.calls(_write) or hook.calls(_zero_grad)) for hook in hooks
    ):
        raise ValueError(
            "model: an earlier Pruner holds filters of it at zero; call compact() or close() of "
            "that one first, or go on with copy.deepcopy(model), where they are plain zeros"
        )
