"""Which units the proof removes from a group, step after step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.pruning.groups import Group

#: One for each way to choose units.
STEPS = 3


def units_by_step(group: Group, number: int) -> Tensor:
    """The units of a group that are removed in each step: [steps, U] bool.

    Half of them in all, or an odd number where it may be. How many go in a step differs between
    groups of one size, since code may take the width of one for another's.
    """
    drawn = random.Random(number)
    gone = torch.zeros(STEPS, group.size, dtype=torch.bool)
    if not (first := group.next_to_go(group.size)):
        return gone
    last = min(max(group.size // 2, first), group.most_removable(group.size))
    allowed = range(first, last + 1, group.multiple)
    most = max((count for count in allowed if count % 2), default=allowed[-1])
    counts = [0, *range(first, most + 1, group.multiple)]
    begin = (number + 1) % len(counts)
    middle = drawn.randrange(begin, len(counts))
    left, before = list(range(group.size)), 0
    for step, count in enumerate((counts[begin], counts[middle], most)):
        going, before = count - before, count
        way = (number + step) % STEPS
        if way == 0:
            chosen, left = left[:going], left[going:]
        elif way == 1:
            chosen, left = left[len(left) - going :], left[: len(left) - going]
        else:
            chosen = drawn.sample(left, going)
            left = sorted(set(left).difference(chosen))
        gone[step, chosen] = True
    return gone


def all_have_lost(gone: Sequence[Tensor], masked: Sequence[Tensor]) -> bool:
    """Whether every group that has units masked has had some removed."""
    pairs = zip(gone, masked, strict=True)
    return all(bool(lost.any()) for lost, units in pairs if units.any())
