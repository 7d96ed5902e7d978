"""Physical removal: Torch-Pruning cuts the modules, and the optimizer's state is cut with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from taylor_kernels.pruning.units import (
    BOTH,
    IN,
    OUT,
    Axis,
    Group,
    removed_channels,
    removed_entries,
)

Cuts = dict[int, Axis]  # dimension -> the entries to remove


def remove(
    model: nn.Module,
    groups: Sequence[Group],
    dead: Sequence[Tensor],
    optimizer: Optimizer | None = None,
) -> None:
    """Remove the dead units ([U] bool per group) from the model, in place.

    Parameters are replaced by smaller ones, with their gradients, `requires_grad` and memory
    format; the optimizer's parameter groups and state follow.

    Raises:
        ValueError: a state tensor of the optimizer has no dimensions of the parameter's. Nothing
            is changed then.
    """
    entries = removed_entries(groups, dead)
    old = {name: lookup(model, name) for name in entries}
    if optimizer is not None:
        for name, cuts in entries.items():
            for key, value in optimizer.state.get(old[name], {}).items():
                _state_cuts(name, key, value, old[name], cuts)
    with torch.no_grad():
        for (owner, side), channels in removed_channels(groups, dead).items():
            _cut_module(model, owner, side, channels.tolist())
        for name, cuts in entries.items():
            _finish(model, name, old[name], cuts)
    if optimizer is not None:
        new = {old[name]: lookup(model, name) for name in entries}
        _follow(optimizer, new, {old[name]: (name, cuts) for name, cuts in entries.items()})


def lookup(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _cut_module(model: nn.Module, owner: str, side: str, channels: list[int]) -> None:
    from torch_pruning.ops import OPTYPE, module2type
    from torch_pruning.pruner.function import PrunerBox

    if side.startswith("dim "):
        return  # a bare parameter has no module to keep in step; _finish cuts it
    module: Any = model.get_submodule(owner)
    if isinstance(module, _ConvNd) and module.transposed and module.groups > 1 and side != BOTH:
        # Torch-Pruning takes the weight's dimensions for those of an ordinary grouped convolution.
        if side == OUT:
            module.out_channels -= len(channels)
        else:
            module.in_channels -= len(channels)
        return
    if isinstance(module, _ConvNd):
        # Not by what the module looks like by now: a grouped convolution cut down to one output
        # per group would pass for a depthwise one.
        kind = OPTYPE.DEPTHWISE_CONV if side == BOTH else OPTYPE.CONV
    else:
        kind = module2type(module)
    cut = PrunerBox[kind].prune_in_channels if side == IN else PrunerBox[kind].prune_out_channels
    cut(module, channels)


def _finish(model: nn.Module, name: str, old: Tensor, cuts: Cuts) -> None:
    """Cut what Torch-Pruning left whole, and restore what it does not carry over.

    It leaves the running statistics of InstanceNorm whole, makes every parameter trainable and
    drops channels_last.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    new = lookup(model, name)
    short = {dim: cut for dim, cut in cuts.items() if new.size(dim) == old.size(dim)}
    if short:
        whole, new = new, _cut(new, short)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new)
            new.grad = None if whole.grad is None else _cut(whole.grad, short)
        setattr(module, leaf, new)
    if isinstance(old, nn.Parameter):
        new.requires_grad_(old.requires_grad)
        if old.dim() == 4 and not old.is_contiguous():
            layout = torch.channels_last
            new.data = new.data.contiguous(memory_format=layout)
            if new.grad is not None:
                new.grad = new.grad.contiguous(memory_format=layout)


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, cut in cuts.items():
        keep = torch.ones(tensor.size(dim), dtype=torch.bool)
        keep[cut.index] = False
        tensor = tensor.index_select(dim, keep.nonzero().flatten().to(tensor.device))
    return tensor


def _state_cuts(name: str, key: str, value: object, parameter: Tensor, cuts: Cuts) -> Cuts:
    """The cuts that apply to a state tensor: those along dimensions it has in full."""
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return {}
    pairs = list(zip(value.shape, parameter.shape, strict=False))
    if value.dim() != parameter.dim() or any(mine not in (1, theirs) for mine, theirs in pairs):
        raise ValueError(
            f"optimizer: its state {key!r} of {name!r} has shape {tuple(value.shape)}, which does "
            f"not follow the parameter's {tuple(parameter.shape)}, so it cannot be cut with it; "
            "use an optimizer whose state has an entry per weight (SGD, Adam, ...), or build the "
            "pruner with optimizer=None and make a new optimizer after compact()"
        )
    return {dim: cut for dim, cut in cuts.items() if value.size(dim) == parameter.size(dim)}


def _follow(
    optimizer: Optimizer, new: dict[Tensor, Tensor], cuts: dict[Tensor, tuple[str, Cuts]]
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
    for old, parameter in new.items():
        if old in optimizer.state:
            name, along = cuts[old]
            state = optimizer.state.pop(old)
            for key, value in state.items():
                if own := _state_cuts(name, key, value, old, along):
                    state[key] = _cut(value, own)
            optimizer.state[parameter] = state


def zero_state(optimizer: Optimizer, name: str, parameter: Tensor, cuts: Cuts) -> None:
    """Set the state of masked entries to zero, which is where removal would have left them."""
    for key, value in optimizer.state.get(parameter, {}).items():
        for dim, cut in _state_cuts(name, key, value, parameter, cuts).items():
            value.index_fill_(dim, cut.index.to(value.device), 0)
