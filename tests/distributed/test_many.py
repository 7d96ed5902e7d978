"""A rank of a thousand: what it sends, receives and has to hold, by simulation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from bench import ranks as bench
from bench.harness import peak_growth
from tests.distributed import runs
from tests.distributed.prunings import minibatch, started, step_of
from tests.distributed.runs import close, formula

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = 1000


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "taylor_fo", "obd_fisher"])
def test_a_meter_of_a_thousand(criterion):
    ranks = bench.Simulated(RANKS)
    model = runs.network()
    imp = tk.Importance(model, criterion, ranks=ranks)
    batches = runs.minibatches(3, 8)
    for batch in batches:
        runs.update(imp, model, batch)
    scores = imp.compute()
    assert ranks.collectives == 1
    assert ranks.bytes_sent == formula(criterion, 3)
    # All hold the same examples, whose parts of the whole loss are a thousandth of their own.
    wanted = runs.alone(criterion, batches)
    part = 1.0 if criterion != "taylor_fo_gate" else RANKS**-2
    wanted["scores"] = {name: part * value for name, value in wanted["scores"].items()}
    close({"scores": scores}, wanted, "scores", rtol=1e-4)


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo"])
def test_a_pruning_of_a_thousand(criterion):
    ranks = bench.Simulated(RANKS)
    model, optimizer, pruner = started(criterion, ranks)
    for step in range(6):
        step_of(pruner, optimizer, model, model, minibatch(step))
    assert len(pruner.history) == 2
    assert ranks.collectives == 2 * 2
    assert ranks.bytes_sent == 2 * bench.formula(criterion, pruner)


def test_the_memory_of_a_rank():
    """Twice what it receives: as it came, and as numbers."""
    filters = 20_000
    model = nn.Linear(4, filters)
    ranks = bench.Simulated(RANKS)
    imp = tk.Importance(model, "taylor_fo_bn", ranks=ranks)
    model(torch.randn(8, 4)).square().mean().backward()
    imp.update()
    _, grown = peak_growth(imp.compute)
    received = RANKS * (16 + 24 + 4 * filters + 1)
    assert ranks.bytes_sent * RANKS == received
    if grown is None:
        pytest.skip("the peak of memory is Linux's to tell")
    assert 0.9 * received < grown < 2.3 * received
