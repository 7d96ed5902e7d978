"""What a unit is, in a few words: a channel, a head, the same place of several parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from taylor_kernels.tracing.answer.channels import Channels


def units_in_words(channels: Channels) -> list[str]:
    """What each unit of each group is, of the layer that has most channels of it.

    A reshape that cuts channels lets whole parts go or the same places of all parts; which of both
    it is shows in the places of a unit's channels. Parts that attention keeps apart are heads.
    """
    record, label = channels._record, channels._label
    heads, of_heads = np.zeros(label.size, bool), np.zeros(label.size, bool)
    for atoms in record.heads:
        heads[label[atoms]] = True
    for table, choice in zip(record.tables, channels.choices, strict=True):
        axes = [label[axis] for axis in table.axes]
        if choice.axis is not None:
            live = axes.pop(choice.axis)  # a place of each of the others
            of_heads[live] |= any(heads[axis].all() for axis in axes)
    found = []
    for group in channels.groups:
        if not group.producers:
            found.append("")
            continue
        widest = max(group.producers, key=lambda slot: slot.index.size(1))
        count = channels.layers[widest.owner][1].numel()
        mine = group.classes.numpy()
        if heads[mine].all():
            found.append(f"a head: {_places(widest.index, count, 'parts')}")
        else:
            parts = "heads" if of_heads[mine].any() else "parts"
            found.append(_places(widest.index, count, parts))
    return found


def _places(index: Tensor, count: int, parts: str) -> str:
    """Where the channels [U, m] of units lie among those of a layer."""
    size = index.size(1)
    if size == 1:
        return "a channel"
    steps = index.diff(dim=1)
    if not torch.equal(steps, steps[:1].expand_as(steps)):
        return f"{size} channels"
    jumps = (steps[0] != 1).nonzero().flatten()
    run = int(jumps[0]) + 1 if jumps.numel() else size
    times = size // run
    alike = steps[0][run - 1 :: run]
    if not torch.equal(jumps, torch.arange(1, times) * run - 1) or alike.unique().numel() > 1:
        return f"{size} channels"
    if times == 1:
        whole = count % size == 0
        return f"a whole part of {count // size} x {size}" if whole else f"{size} in a row"
    if int(alike[0]) + run - 1 != count // times:
        return f"{size} channels"
    return f"{'the same place' if run == 1 else f'{run} in a row'} of each of {times} {parts}"
