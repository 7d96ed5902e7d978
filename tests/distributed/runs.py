"""What the ranks of these tests run: one minibatch, cut in parts, under every criterion."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic

Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Module:
    """Examples do not meet in it: its norms are in eval mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    )
    nn.init.normal_(model[1].weight, 1.0, 0.3)
    nn.init.normal_(model[1].bias, 0.0, 0.3)
    return model.eval()


def minibatches(count: int, examples: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(examples, 3, 5, 5, generator=generator),
            torch.randint(4, (examples,), generator=generator),
        )
        for _ in range(count)
    ]


def part(batch: Batch, rank: int, cuts: Sequence[int]) -> Batch | None:
    """The examples of a rank: `cuts` says how many each has."""
    begin, end = sum(cuts[:rank]), sum(cuts[: rank + 1])
    return (batch[0][begin:end], batch[1][begin:end]) if end > begin else None


def even(batch: Batch, size: int) -> list[int]:
    return [len(batch[0]) // size] * size


def loss_of(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def scored(
    model: nn.Module,
    imp: tk.Importance,
    batches: Sequence[Batch | None],
    *,
    wrapped: nn.Module | None = None,
    reduction: str = "mean",
    weigh: bool = False,
    scale: float = 1.0,
) -> None:
    """Hand minibatches to a meter, None for those that this rank has no part of."""
    for batch in batches:
        model.zero_grad()
        if batch is None:
            imp.absent()
            continue
        weight = float(len(batch[0])) if weigh else 1.0
        if imp.needs_closure:
            imp.update(closure=lambda batch=batch: loss_of(model, batch, reduction), weight=weight)
            continue
        (loss_of(wrapped or model, batch, reduction) * scale).backward()
        imp.update(weight=weight, loss_scale=scale)


def reads(criterion: str) -> str:
    return get_statistic(get_criterion(criterion).statistic).reads


def in_ranks(
    rank: int, size: int, criteria: Sequence[str], cuts: Sequence[Sequence[int]], options: dict,
    reduction: str, weigh: bool,
) -> dict[str, Any]:  # fmt: skip
    """Scores by criterion, over minibatches cut among the ranks as `cuts` says of each."""
    found = {}
    whole = minibatches(len(cuts), sum(cuts[0]))
    mine = [part(batch, rank, cut) for batch, cut in zip(whole, cuts, strict=True)]
    for criterion in criteria:
        model = network()
        ranks = tk.distributed.Ranks(**options)
        imp = tk.Importance(model, criterion, ranks=ranks)
        wrap = reads(criterion) == "weight gradients" and ranks.gradients == "averaged"
        ddp = DistributedDataParallel(copy_of := model) if wrap else None
        assert ddp is None or ddp.module is copy_of
        scored(model, imp, mine, wrapped=ddp, reduction=reduction, weigh=weigh)
        found[criterion] = {
            "scores": imp.compute(),
            "error": imp.standard_error(),
            "state": copy.deepcopy(imp.state_dict()),
            "collectives": ranks.collectives,
            "bytes": ranks.bytes_sent,
        }
    return found


def alone(
    criteria: Sequence[str], count: int, examples: int, reduction: str = "mean", scale: float = 1.0
) -> dict[str, Any]:
    """The same of one process that sees the whole minibatches."""
    found = {}
    for criterion in criteria:
        model = network()
        imp = tk.Importance(model, criterion)
        for batch in minibatches(count, examples):
            model.zero_grad()
            if imp.needs_closure:
                imp.update(closure=lambda b=batch, m=model: loss_of(m, b, reduction))
            else:
                loss_of(model, batch, reduction).backward()
                imp.update(loss_scale=scale)
        found[criterion] = {"scores": imp.compute(), "error": imp.standard_error()}
    return found
