"""Channels that no weight reads any more, and their removal."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.methods.spp_groups import layer_of, read_channels, readers
from taylor_kernels.pruning.removing.optimizer_state import check_optimizer_types
from taylor_kernels.pruning.removing.removal import remove
from taylor_kernels.tracing import Channels, trace
from taylor_kernels.tracing.run.running import call, copied, quiet, tensors_in


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

    All are tried on a copy first. Channels stay that something reads which is no layer, a
    product of activations for one, as the outputs then differ.

    Args:
        model: traced anew; layers whose filters write such channels lose them.
        example_inputs: what the model is called with, as `tk.trace` takes it.
        optimizer: one, or several, whose state is cut to match.

    Returns:
        How many units went.

    Raises:
        TypeError, ValueError: no optimizer, or one that cannot be cut. Nothing is changed then.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = model[1].weight.data[:, :3].zero_()
        >>> tk.methods.remove_unread(model, torch.randn(1, 4)), model[0].out_features
        (3, 5)
    """
    check_optimizer_types(optimizer)
    channels = trace(model, example_inputs).gone_at_zero()
    dead = unread_units(model, channels)
    expected = _outputs(copy.deepcopy(model).eval(), example_inputs)

    def stays(units: list[Tensor]) -> bool:
        trial = copy.deepcopy(model).eval()
        remove(trial, channels, units)
        return _same(expected, _outputs(trial, example_inputs))

    if any(units.any() for units in dead) and not stays(dead):
        for number, units in enumerate(dead):  # one by one only where they fail together
            alone = [each if i == number else each & False for i, each in enumerate(dead)]
            if units.any() and not stays(alone):
                dead[number] = units & False
        if not stays(dead):
            dead = [units & False for units in dead]
    remove(model, channels, dead, optimizer)
    return int(sum(each.sum() for each in dead))


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    return len(expected) == len(found) and all(
        old.shape == new.shape
        and torch.allclose(old, new, rtol=1e-4, atol=1e-5 * max(1e-30, float(old.abs().max())))
        for old, new in zip(expected, found, strict=True)
        if old.numel()
    )


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with quiet(model.modules()):
        found = call(model, copied(example_inputs))
        return [t.clone() for t in tensors_in(found) if t.is_floating_point()]
