"""Masks that are really off and stay off, until they are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.pruning.removal import Cuts, lookup, zero_state
from taylor_kernels.pruning.units import Group, removed_entries


class Masks:
    """The dead units of a model, held at zero.

    Everything that removal would take is zero (running variances one): producers' filters, the
    norms and parameters behind them, consumers' input columns, their gradients and the
    optimizer's state. Gradients are zeroed as they arrive; tensors are written again around every
    forward pass of the model, which undoes what an unknown optimizer's momentum did to them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def set(self, groups: Sequence[Group], dead: Sequence[Tensor]) -> None:
        """Mask exactly the dead units ([U] bool per group); what was masked before stays zero."""
        self.close()
        entries = removed_entries(groups, dead)
        if not entries:
            return
        entries = {name: _placed(cuts, lookup(self._model, name)) for name, cuts in entries.items()}
        parameters = {name: p for name, p in self._model.named_parameters() if name in entries}
        write(self._model, entries)
        for name, parameter in parameters.items():
            zero = _ZeroGrad(entries[name])
            zero(parameter)
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(zero))
            if self._optimizer is not None:
                zero_state(self._optimizer, name, parameter, entries[name])
        statistics = {name: cuts for name, cuts in entries.items() if name not in parameters}
        self._hooks.append(self._model.register_forward_pre_hook(_Write(entries)))
        # Training moves a masked channel's variance off one; it is put back at once.
        self._hooks.append(self._model.register_forward_hook(_Write(statistics)))

    def close(self) -> None:
        """Take the hooks off; the values stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def write(model: nn.Module, entries: Mapping[str, Cuts]) -> None:
    """Set the entries of the model's tensors to their fill values."""
    for name, cuts in entries.items():
        # .data: a forward pass may lie between another one and its backward pass, and the values
        # that are written are the ones that were there.
        _fill(lookup(model, name).data, cuts)


def _fill(tensor: Tensor, cuts: Cuts) -> None:
    for dim, cut in cuts.items():
        tensor.index_fill_(dim, cut.index.to(tensor.device), cut.fill)


def _placed(cuts: Cuts, tensor: Tensor) -> Cuts:
    """The same cuts with their indices where the tensor is, so that no hook copies them there."""
    return {dim: replace(cut, index=cut.index.to(tensor.device)) for dim, cut in cuts.items()}


class _ZeroGrad:
    """Zeroes the masked entries of a parameter's gradient; a picklable hook."""

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            _fill(parameter.grad.data, self._cuts)


class _Write:
    """Writes masked entries before or after a forward pass; a picklable hook."""

    def __init__(self, entries: Mapping[str, Cuts]) -> None:
        self._entries = entries

    def __call__(self, model: nn.Module, *_: object) -> None:
        write(model, self._entries)
