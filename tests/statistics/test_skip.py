"""A minibatch that is skipped, as a GradScaler skips one that overflowed, leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic
from tests.helpers import nets

pytestmark = pytest.mark.usefixtures("one_thread")
CRITERIA = [
    name
    for name in tk.criterion_names()
    if get_statistic(get_criterion(name).statistic).reads in ("weight gradients", "activations")
]


def scores(model, criterion, factors):
    """After a minibatch of each factor of the loss; those with none or inf are skipped."""
    imp = tk.Importance(model, criterion)
    for seed, factor in enumerate(factors):
        torch.manual_seed(seed)
        data = nets.batch()
        if factor is None:
            continue
        model.zero_grad()
        (nets.loss_of(model, data) * factor).backward()
        if factor == 1:
            imp.update()
        else:
            imp.skip()
    imp.close()
    return imp.compute()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("factor", [torch.inf, 3.0], ids=["overflowed", "finite"])
def test_a_skipped_minibatch_changes_no_bit(criterion, factor):
    torch.manual_seed(0)
    model = nets.mixed()
    expected = scores(copy.deepcopy(model), criterion, [None, 1, None, 1])
    found = scores(model, criterion, [factor, 1, factor, 1])
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_pruning_goes_on_after_an_overflow(criterion):
    """The loop of docs/pruning.md, whose first scale is too great for float16."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    x, y = torch.randn(8, 3, 6, 6), torch.randint(4, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-25)
    pruner = tk.Pruner(model, x, criterion, filters=0.5, every=2, per_step=2, optimizer=optimizer)
    skipped = 0
    while not pruner.done:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        if all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            pruner.step(loss_scale=scaler.get_scale())
        else:
            skipped += 1
            pruner.skip()
        scaler.step(optimizer)
        scaler.update()
    assert skipped == 1
    assert [record.step for record in pruner.history] == [2, 4]


def test_without_skipping_the_error_says_to():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    pruner = tk.Pruner(model, torch.randn(2, 3), "taylor_fo_gate", filters=0.5, every=1)
    for factor in (torch.inf, 1.0):
        (model(torch.randn(4, 3)).square().mean() * factor).backward()
    with pytest.raises(RuntimeError, match=r"call skip\(\) in place of step\(\) for minibatches"):
        pruner.step()


def test_what_is_done_or_closed():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    pruner = tk.Pruner(model, torch.randn(2, 3), "magnitude_l1", filters=1.0)
    assert pruner.done
    pruner.skip()
    pruner.close()
    with pytest.raises(RuntimeError, match="the pruner is closed"):
        pruner.skip()
    imp = tk.Importance(model)
    imp.close()
    with pytest.raises(RuntimeError, match="skip: the meter is closed"):
        imp.skip()
