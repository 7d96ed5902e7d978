"""Which units and blocks of a model are masked, which are gone, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from taylor_kernels.pruning.choosing.groups import Group, by_schedule
from taylor_kernels.pruning.prunable import Prunable
from taylor_kernels.tracing import Block, Channels


class Inventory:
    """What there was of a model's coupled groups and blocks at first, and what there is.

    It says what a state holds, and what would have to go for one to be taken on; nothing is done to
    the model.

    Attributes:
        first: the groups as they were at first, which `state` is of.
        channels: as the model is now; `Group.classes` says which units are left.
        dead: per group [U] bool, True for units that are masked.
        meter: counts masked and removed units and blocks as gone.
        blocks: the residual blocks there were at first, if they may go.
    """

    def __init__(self, prunable: Prunable) -> None:
        self.channels = self._whole = prunable.channels
        self.dead = [torch.zeros(group.size, dtype=torch.bool) for group in prunable.groups]
        self.meter = prunable.meter
        self.first = prunable.groups
        self._original_widths = prunable.widths
        self.blocks = prunable.blocks
        self._off = torch.zeros(len(self.blocks), dtype=torch.bool)  # blocks masked or removed
        self._removed = self._off.clone()  # of these the ones that are removed

    @property
    def groups(self) -> list[Group]:
        return cast("list[Group]", self.channels.groups)

    @property
    def left(self) -> list[int]:
        """The numbers of the blocks that are neither masked nor removed."""
        return (~self._off).nonzero().flatten().tolist()

    @property
    def blocks_off(self) -> list[Block]:
        """The blocks that are masked or removed."""
        return [block for block, off in zip(self.blocks, self._off.tolist(), strict=True) if off]

    @property
    def widths(self) -> dict[str, int]:
        """Layer -> filters left, masked ones not counted."""
        widths = dict(self._original_widths)
        for first, units in zip(self.first, self._gone(), strict=True):
            for slot in first.producers:
                widths[slot.owner] -= units * slot.index.size(1)
        off = self.blocks_off
        return {n: 0 if any(b.holds(n) for b in off) else width for n, width in widths.items()}

    def state(self) -> dict[str, list[Tensor]]:
        """Masks over the units as they were at first: "removed" in any way, and "compacted"."""
        removed, compacted = [], []
        for left, dead in zip(self._left(), self.dead, strict=True):
            compacted.append(~left)
            off = ~left
            off[left] = dead
            removed.append(off)
        return {"removed": removed, "compacted": compacted}

    def block_state(self) -> dict[str, Any]:
        """The names of the blocks; [B] bool, which are "removed" in any way, and "compacted"."""
        names = [block.name for block in self.blocks]
        return {"names": names, "removed": self._off.clone(), "compacted": self._removed.clone()}

    def stale(self, compacted: Sequence[Tensor], blocks: Tensor) -> list[Tensor]:
        """Which present units a state has removed from the model: [U] bool per group.

        Args:
            blocks: [B] bool, those that the state has removed from the model.

        Raises:
            ValueError: the model has lost units that the state still has.
        """
        for own, theirs in zip(self.state()["compacted"], compacted, strict=True):
            if (own & ~theirs).any():
                raise ValueError(
                    "state: it holds filters that have been removed from this model; load it into "
                    "a pruner of the model as it was at first"
                )
        if (self._removed & ~blocks).any():
            raise ValueError(
                "state: it holds blocks that have been removed from this model; load it into a "
                "pruner of the model as it was at first"
            )
        return [gone[left] for left, gone in zip(self._left(), compacted, strict=True)]

    def check_in_step(self, state: Mapping[str, Any]) -> None:
        """The units of stages that a state has removed are those of a narrower stage.

        Raises:
            ValueError: they are not.
        """
        for schedule, numbers in by_schedule(self.first):
            kinds = [self.first[number].kind for number in numbers]
            for name in ("removed", "compacted"):
                alive = [int((~state[name][number]).sum()) for number in numbers]
                if not schedule.has(alive, kinds):
                    raise ValueError(
                        "state: it is damaged (of the layers "
                        f"{self.first[numbers[0]].name!r} and others, which lose their filters in "
                        f"step, it has {name} as no network of this model's code could)"
                    )

    def _masked_blocks(self) -> list[Block]:
        masked = (self._off & ~self._removed).tolist()
        return [block for block, off in zip(self.blocks, masked, strict=True) if off]

    def _left(self) -> list[Tensor]:
        """Which units of each group, as it was at first, the model still has: [U] bool."""
        return [
            torch.ones(first.size, dtype=torch.bool)
            if first.size == group.size
            else torch.isin(first.classes, group.classes)
            for first, group in zip(self.first, self.groups, strict=True)
        ]

    def _gone(self) -> list[int]:
        """Units of each group that are masked or removed."""
        return [
            first.size - group.size + int(dead.sum())
            for first, group, dead in zip(self.first, self.groups, self.dead, strict=True)
        ]

    def _cutting(self, blocks: Tensor) -> Channels:
        """The channels to remove stale units from, where these blocks ([B] bool) are removed."""
        gone = [b for b, off in zip(self.blocks, blocks.tolist(), strict=True) if off]
        return self._whole.without([~left for left in self._left()]).leaving(gone)
