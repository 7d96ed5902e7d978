"""Channels that no weight reads any more, and their removal."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.methods.spp_groups import layer_of, read_channels, readers
from taylor_kernels.pruning.removal import remove
from taylor_kernels.tracing import Channels, trace
from taylor_kernels.tracing.running import call, copied, quiet, tensors_in


def unread_units(model: nn.Module, channels: Channels) -> list[Tensor]:
    """For each traced group [U] bool: True for units that every reading layer has zeros for.

    One unit of each group stays, since a layer without channels does not run.
    """
    found = []
    for group in channels.groups:
        slots = readers(group, model)
        unread = torch.full((group.size,), bool(slots))
        for slot in slots:
            read = read_channels(layer_of(model, slot.owner)).cpu()
            unread &= ~read[slot.index].any(1)
        if unread.all():
            unread[0] = False
        found.append(unread)
    return found


def remove_unread(model: nn.Module, example_inputs: Any, optimizer: object = None) -> int:
    """Remove the channels that no weight reads, in place; the outputs stay what they were.

    Args:
        model: traced anew; layers whose filters write such channels lose them.
        example_inputs: what the model is called with, as `tk.trace` takes it.
        optimizer: one, or several, whose state is cut to match.

    Returns:
        How many units went.

    Raises:
        ValueError: the outputs on the example inputs would be others, which a model that reads
            channels by other means than layers can cause. Nothing is changed then.
    """
    channels = trace(model, example_inputs)
    dead = unread_units(model, channels)
    trial = copy.deepcopy(model).eval()
    before = _outputs(trial, example_inputs)
    remove(trial, channels, dead)
    for old, new in zip(before, _outputs(trial, example_inputs), strict=True):
        if old.shape != new.shape or not torch.allclose(old, new, rtol=1e-3, atol=1e-5):
            raise ValueError(
                "model: without the channels that no layer reads its outputs are others; something "
                "else reads them"
            )
    remove(model, channels, dead, optimizer)
    return int(sum(each.sum() for each in dead))


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with quiet():
        found = call(model, copied(example_inputs))
        return [t.clone() for t in tensors_in(found) if t.is_floating_point()]
