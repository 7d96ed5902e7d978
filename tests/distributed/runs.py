"""What the ranks of these tests run: minibatches, cut in parts, under every criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic
from tests.distributed.threads import Averaged, Meeting, ThreadRanks

Batch = tuple[Tensor, Tensor]
#: The examples of each rank in a minibatch.
Cuts = Sequence[int]
#: Three minibatches of two ranks.
EVEN = [[4, 4]] * 3
#: Of `network`.
FILTERS, LAYERS = 6 + 8 + 10 + 4, 4


def network(seed: int = 0, *, train: bool = False) -> nn.Module:
    """Examples do not meet in it: its norm is in eval mode."""
    generator = torch.Generator().manual_seed(seed)
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
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model[1].weight.add_(1.0)
    model.train(train)
    model[1].eval()
    return model


def minibatches(count: int, examples: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(examples, 3, 5, 5, generator=generator),
            torch.randint(4, (examples,), generator=generator),
        )
        for _ in range(count)
    ]


def part(batch: Batch, rank: int, cuts: Cuts) -> Batch | None:
    begin, end = sum(cuts[:rank]), sum(cuts[: rank + 1])
    return (batch[0][begin:end], batch[1][begin:end]) if end > begin else None


def parts(cuts: Sequence[Cuts], seed: int = 1) -> list[list[Batch | None]]:
    """Minibatch -> what of it each rank has."""
    whole = minibatches(len(cuts), sum(cuts[0]), seed)
    return [
        [part(batch, rank, cut) for rank in range(len(cut))]
        for batch, cut in zip(whole, cuts, strict=True)
    ]


def loss_of(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def reads(criterion: str) -> str:
    return get_statistic(get_criterion(criterion).statistic).reads


def update(
    imp: tk.Importance, model: nn.Module, batch: Batch, reduction: str = "mean", **given: Any
) -> None:
    """One minibatch, whatever the criterion needs."""
    model.zero_grad()
    if imp.needs_closure:
        imp.update(closure=lambda: loss_of(model, batch, reduction), **given)
        return
    loss_of(model, batch, reduction).backward()
    imp.update(**given)


def result(imp: tk.Importance, ranks: tk.distributed.Ranks | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"scores": imp.compute(), "error": imp.standard_error()}
    if ranks is not None:
        found |= {"collectives": ranks.collectives, "bytes": ranks.bytes_sent}
        found |= {"state": imp.state_dict(), "dropped": imp.dropped}
    return found


def scored(
    rank: int, size: int, meeting: Meeting, criterion: str, cuts: Sequence[Cuts],
    options: dict[str, Any], reduction: str = "mean", weigh: bool = False,
    spoil: Callable[[int, int, Batch], Batch] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A thread's scores.

    Args:
        options: of Ranks.
        weigh: by examples.
        spoil: changes a rank's part of a minibatch.
    """
    model = network()
    ranks = ThreadRanks(meeting, rank, **options)
    imp = tk.Importance(model, criterion, ranks=ranks)
    averages = reads(criterion) == "weight gradients" and ranks.gradients == "averaged"
    for number, of_ranks in enumerate(parts(cuts)):
        batch = of_ranks[rank]
        if batch is not None and spoil is not None:
            batch = spoil(rank, number, batch)
        if averages:
            model.zero_grad()
            if batch is not None:
                loss_of(model, batch, reduction).backward()
            Averaged(model, ranks).average()
            imp.update() if batch is not None else imp.absent()
        elif batch is None:
            imp.absent()
        else:
            weight = float(len(batch[0])) if weigh else 1.0
            update(imp, model, batch, reduction, weight=weight)
    return result(imp, ranks)


def alone(
    criterion: str, batches: Sequence[Batch], reduction: str = "mean", scale: float = 1.0
) -> dict[str, Any]:
    """The same of one process that sees these minibatches."""
    model = network()
    imp = tk.Importance(model, criterion)
    for batch in batches:
        given = {} if imp.needs_closure else {"loss_scale": scale}
        update(imp, model, batch, reduction, **given)
    return result(imp)


def in_processes(rank: int, size: int, criteria: Sequence[str], cuts: Sequence[Cuts]) -> dict:
    """The scores of a process under DistributedDataParallel, by criterion."""
    found = {}
    for criterion in criteria:
        model, ranks = network(), tk.distributed.Ranks(timeout=60)
        imp = tk.Importance(model, criterion, ranks=ranks)
        wrapped = DistributedDataParallel(model)
        for of_ranks in parts(cuts):
            batch = of_ranks[rank]
            assert batch is not None
            model.zero_grad()
            loss_of(wrapped, batch).backward()
            imp.update()
        found[criterion] = result(imp, ranks)
    return found


def close(found, wanted, *keys, rtol=2e-5):
    for key in keys:
        assert found[key].keys() == wanted[key].keys()
        for name, value in wanted[key].items():
            scale = float(wanted["scores"][name].nan_to_num().abs().max())
            torch.testing.assert_close(
                found[key][name], value, rtol=rtol, atol=rtol * scale, equal_nan=True
            )


def formula(criterion, minibatches):
    """Bytes that a rank sends at a compute()."""
    kind = get_statistic(get_criterion(criterion).statistic)
    tables = kind.across_ranks in ("sum", "mean")
    columns = kind.shared_columns * minibatches if tables else 2
    return 16 + 24 * minibatches + 4 * columns * FILTERS + LAYERS * (1 if tables else 5)
