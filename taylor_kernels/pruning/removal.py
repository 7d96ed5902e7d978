"""Physical removal: indices are deleted from parameters, buffers, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.pruning.optimizer_state import check_follows, cut, follow
from taylor_kernels.tracing import Channels


def remove(
    model: nn.Module,
    channels: Channels,
    dead: Sequence[Tensor],
    optimizer: Optimizer | None = None,
) -> None:
    """Remove the dead units ([U] bool per group) from the model, in place.

    Parameters are replaced by smaller ones, with their gradients, `requires_grad` and memory
    format; the optimizer's parameter groups and state follow, and so do module attributes that
    count channels.

    Raises:
        ValueError: a state tensor of the optimizer has no dimensions of the parameter's. Nothing
            is changed then.
    """
    entries = channels.entries(dead)
    old = {name: lookup(model, name) for name in entries}
    if optimizer is not None:
        for name, cuts in entries.items():
            check_follows(optimizer, name, old[name], cuts)
    with torch.no_grad():
        new = {name: _smaller(old[name], cuts) for name, cuts in entries.items()}
    assign(model, new)
    for name, values in channels.attributes(dead).items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, value)
    if optimizer is not None:
        follow(optimizer, {n: (old[n], new[n], cuts) for n, cuts in entries.items()})


def lookup(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of the parameters and buffers of these names, wherever those are."""
    new = {id(lookup(model, name)): tensor for name, tensor in tensors.items()}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in new:
                # Not into the tables: recurrent layers keep a list of their parameters beside.
                setattr(module, leaf, new[id(tensor)])


def _smaller(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    new = _cut_as_laid_out(tensor.detach(), cuts)
    if not isinstance(tensor, nn.Parameter):
        return new
    parameter = nn.Parameter(new, tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = _cut_as_laid_out(tensor.grad, cuts)
    return parameter


def _cut_as_laid_out(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    new = cut(tensor, cuts)
    if tensor.dim() == 4 and tensor.layout == torch.strided and not tensor.is_contiguous():
        return new.contiguous(memory_format=torch.channels_last)
    return new
