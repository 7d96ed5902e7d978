"""A pruning run of twelve steps, by one process or by ranks that see parts of its minibatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.distributed import runs
from tests.distributed.threads import Averaged

STEPS, EXAMPLES = 12, 8


def started(
    criterion: str,
    ranks: tk.distributed.Ranks | None,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, tk.Pruner]:
    model = runs.network(train=True) if model is None else model
    optimizer = sgd(model)
    settings = {"filters": 0.5, "every": 3, "per_step": 3} | options
    pruner = tk.Pruner(
        model, torch.zeros(1, 3, 5, 5), criterion, optimizer=optimizer, ranks=ranks, **settings
    )
    return model, optimizer, pruner


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def sharded(model, pruner, old):
    """The model sharded in place; its new optimizer, which has taken over the state of the old."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[3])
    fully_shard(model)
    optimizer = sgd(model)
    tk.distributed.carry_state(old, optimizer)
    pruner.use_optimizer(optimizer)
    return optimizer


def minibatch(step: int) -> runs.Batch:
    return runs.minibatches(1, EXAMPLES, seed=100 + step)[0]


def step_of(pruner, optimizer, model, wrapped, batch):
    optimizer.zero_grad()
    if batch is not None:
        runs.loss_of(wrapped, batch).backward()
    if isinstance(wrapped, Averaged):
        wrapped.average()
    if batch is None:
        record = pruner.absent()
    elif pruner.needs_closure:
        record = pruner.step(closure=lambda: runs.loss_of(model, batch))
    else:
        record = pruner.step()
    optimizer.step()
    return record


def ended(model, pruner):
    return {
        "history": pruner.history,
        "scores": pruner.scores(),
        "blocks": pruner.block_scores(),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def alone(criterion, steps=STEPS, **options):
    model, optimizer, pruner = started(criterion, None, **options)
    for step in range(steps):
        step_of(pruner, optimizer, model, model, minibatch(step))
    return ended(model, pruner)


def part(step, rank, size):
    return runs.part(minibatch(step), rank, [EXAMPLES // size] * size)


def alike(found, wanted, rtol=1e-4):
    assert [r.removed for r in found["history"]] == [r.removed for r in wanted["history"]]
    assert [r.blocks for r in found["history"]] == [r.blocks for r in wanted["history"]]
    assert found["blocks"] == pytest.approx(wanted["blocks"], rel=rtol)
    assert len(found["history"]) > 2
    for key in ("scores", "weights"):
        for name, value in wanted[key].items():
            scale = float(value.nan_to_num().abs().max())
            torch.testing.assert_close(
                found[key][name], value, rtol=rtol, atol=rtol * scale, equal_nan=True
            )


def same_bits(found):
    for other in found[1:]:
        assert other["history"] == found[0]["history"]
        assert other["blocks"] == found[0]["blocks"]
        for name, value in found[0]["scores"].items():
            assert torch.equal(value.nan_to_num(7.0), other["scores"][name].nan_to_num(7.0))
