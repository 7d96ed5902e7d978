"""What a unit is, in a few words: a channel, a head, the same place of several parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taylor_kernels.tracing.units import Group

if TYPE_CHECKING:
    from taylor_kernels.tracing.channels import Channels


def unit_in_words(channels: Channels, group: Group) -> str:
    """What each unit of a group is, of the layer that has most channels of it.

    A reshape that cuts channels lets whole parts go or the same places of all parts; which of both
    it is shows in the places of a unit's channels. Parts that attention keeps apart are heads.
    """
    if not group.producers:
        return ""
    widest = max(group.producers, key=lambda slot: slot.index.size(1))
    count = channels.layers[widest.owner][1].numel()
    heads = {int(n) for atoms in channels._record.heads for n in channels._label[atoms]}
    mine = set(group.classes.tolist())
    if mine <= heads:
        return f"a head: {_places(widest.index, count, 'parts')}"
    return _places(widest.index, count, "heads" if _of_heads(channels, mine, heads) else "parts")


def _of_heads(channels: Channels, mine: set[int], heads: set[int]) -> bool:
    """Whether what a reshape cuts these units out of are heads."""
    for table, choice in zip(channels._record.tables, channels.choices, strict=True):
        axes = [set(channels._label[axis].tolist()) for axis in table.axes]
        if choice.axis is None or mine.isdisjoint(axes.pop(choice.axis)):
            continue
        if any(axis <= heads for axis in axes):
            return True
    return False


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
