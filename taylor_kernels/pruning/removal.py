"""Physical removal: Torch-Pruning cuts the modules, and the optimizer's state is cut with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from taylor_kernels.pruning.optimizer_state import Cuts, check_follows, cut, follow
from taylor_kernels.pruning.units import (
    BOTH,
    IN,
    OUT,
    Group,
    removed_channels,
    removed_entries,
)


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
            check_follows(optimizer, name, old[name], cuts)
    with torch.no_grad():
        for (owner, side), channels in removed_channels(groups, dead).items():
            _cut_module(model, owner, side, channels.tolist())
        for name, cuts in entries.items():
            _finish(model, name, old[name], cuts)
    if optimizer is not None:
        follow(
            optimizer,
            {name: (old[name], lookup(model, name), cuts) for name, cuts in entries.items()},
        )


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
    box = PrunerBox[kind]
    (box.prune_in_channels if side == IN else box.prune_out_channels)(module, channels)


def _finish(model: nn.Module, name: str, old: Tensor, cuts: Cuts) -> None:
    """Cut what Torch-Pruning left whole, and restore what it does not carry over.

    It leaves the running statistics of InstanceNorm whole, makes every parameter trainable and
    drops channels_last.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    new = lookup(model, name)
    short = {dim: part for dim, part in cuts.items() if new.size(dim) == old.size(dim)}
    if short:
        whole, new = new, cut(new, short)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new)
            new.grad = None if whole.grad is None else cut(whole.grad, short)
        setattr(module, leaf, new)
    if isinstance(old, nn.Parameter):
        new.requires_grad_(old.requires_grad)
        if old.dim() == 4 and not old.is_contiguous():
            layout = torch.channels_last
            new.data = new.data.contiguous(memory_format=layout)
            if new.grad is not None:
                new.grad = new.grad.contiguous(memory_format=layout)
