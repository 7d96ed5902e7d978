"""Networks to select units of, and the selection as one would write it down."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from taylor_kernels.pruning.choosing.budget import Budget
from taylor_kernels.pruning.choosing.flops import Meter
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.tracing import IN, OUT, Entry, Slot


def chain(sizes: Sequence[int], makes: Sequence[tuple[int, int, int]]) -> tuple[list[Group], Meter]:
    """An MLP and its meter; of its hidden layers these are a group each.

    Args:
        sizes: units of each hidden layer.
        makes: of each, (channels of a unit, multiple, minimum).
    """
    widths = [3, *(n * m for n, (m, _, _) in zip(sizes, makes, strict=True)), 2]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    groups = []
    for number, (n, (channels, multiple, minimum)) in enumerate(zip(sizes, makes, strict=True)):
        index = torch.randperm(n * channels).view(n, channels).sort(1).values
        slots = Slot(str(number), OUT, index), Slot(str(number + 1), IN, index)
        entries = (
            Entry(f"{number}.weight", 0, index),
            Entry(f"{number}.bias", 0, index),
            Entry(f"{number + 1}.weight", 1, index),
        )
        groups.append(
            Group(slots, entries, torch.arange(n), (), multiple=multiple, minimum=minimum)
        )
    macs = {name: weight.numel() for name, weight in weights.items()}
    return groups, Meter(model, macs, 2 * sum(macs.values()), groups)


def plain_select(groups, dead, scores, meter: Meter, budget: Budget) -> list[Tensor]:
    """The algorithm as one would write it down: a bundle after the other."""
    bundles = []
    for number, (group, gone, score) in enumerate(zip(groups, dead, scores, strict=True)):
        alive = (~gone).nonzero().flatten()
        order = alive[torch.sort(score[alive].double(), stable=True).indices]
        worth = score[order].double()
        done, dearest = 0, -float("inf")
        while done * group.filters_per_unit < budget.filters:
            count = group.next_to_go(alive.numel() - done)
            if not count:
                break
            chunk = slice(done, done + count)
            dearest = max(dearest, worth[chunk].mean().item())
            bundles.append((dearest, number, done, order[chunk]))
            done += count
    bundles.sort(key=lambda bundle: bundle[:3])
    taken = [[] for _ in groups]
    count = 0
    for _, number, _, units in bundles:
        if count >= budget.filters or budget.met(meter):
            break
        meter.take(groups[number], units.numel())
        taken[number].append(units)
        count += units.numel() * groups[number].filters_per_unit
    nothing = torch.empty(0, dtype=torch.int64)
    return [torch.cat(parts).sort().values if parts else nothing for parts in taken]
