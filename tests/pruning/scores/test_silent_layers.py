"""Layers that no loss has depended on yet: zeros do not rank them, or their units, first."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import taylor_kernels as tk

#: Another meter samples other probes for taylor_so_diag.
COMPARED = ["taylor_fo_bn", "taylor_fo_gate", "taylor_fo", "obd_fisher", "taylor_so_diag_exact"]
CRITERIA = ["taylor_fo_bn", "taylor_fo_gate", "taylor_fo", "obd_fisher", "taylor_so_diag"]


class Tasks(nn.Module):
    """One body, and a head for each of two tasks.

    Args:
        always: all heads are called, whatever loss there is; else those that are asked for.
    """

    def __init__(self, always=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh())
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)) for name in "ab"}
        )
        self.always = always

    def forward(self, x, tasks="ab"):
        x = self.body(x)
        return {n: head(x) for n, head in self.heads.items() if self.always or n in tasks}


def loss_of(model, tasks):
    x = torch.randn(9, 6)
    return lambda: sum(out.square().mean() for n, out in model(x, tasks).items() if n in tasks)


def step(model, pruner, tasks):
    loss = loss_of(model, tasks)
    model.zero_grad()
    if pruner.needs_closure:
        return pruner.step(closure=loss)
    loss().backward()
    return pruner.step()


def steps(count, model, pruner, tasks):
    for _ in range(count):
        step(model, pruner, tasks)


@pytest.mark.filterwarnings("ignore:.*not called in any pass")
@pytest.mark.parametrize("always", [True, False], ids=["called", "not called"])
@pytest.mark.parametrize("criterion", COMPARED)
def test_a_head_whose_loss_comes_later_stays_until_then(criterion, always):
    model = Tasks(always)
    options = dict(params=0.7, every=2, per_step=2)
    pruner = tk.Pruner(model, torch.randn(4, 6), criterion, **options)
    with pytest.warns(UserWarning, match=r"heads\.b\.0: all scores so far are 0.*stay") as caught:
        steps(4, model, pruner, "a")
    assert len([w for w in caught if "so far are 0" in str(w.message)]) == 1
    assert len(pruner.history) == 2
    assert pruner.widths["heads.b.0"] == 10
    assert "all its scores so far are 0" in pruner.skipped["heads.b.0"]
    assert pruner.scores()["heads.b.0"].isnan().all()
    with torch.no_grad():
        model(torch.randn(9, 6))  # validation reaches it before its first loss does
    # From its first loss on it is ranked by its own scores, which no zeros have made smaller.
    meter = tk.Importance(model, criterion, example_inputs=torch.randn(4, 6))
    for _ in range(2):
        loss = loss_of(model, "ab")
        model.zero_grad()
        if pruner.needs_closure:
            meter.update(closure=loss)
            pruner.step(closure=loss)
        else:
            loss().backward()
            meter.update()
            pruner.step()
    shown = pruner.scores()["heads.b.0"]
    left = ~shown.isnan()
    assert left.any()
    torch.testing.assert_close(shown[left], meter.compute()["heads.b.0"][left], rtol=1e-4, atol=0)
    assert "heads.b.0" not in pruner.skipped


@pytest.mark.parametrize("criterion", CRITERIA)
def test_where_the_target_needs_it_a_warning_says_so(criterion):
    model = Tasks()
    pruner = tk.Pruner(model, torch.randn(4, 6), criterion, params=0.1, every=1, per_step=2)
    with pytest.warns(UserWarning, match=r"heads\.b\.0: all scores so far.*they go, in no order"):
        assert step(model, pruner, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while not pruner.done:
            step(model, pruner, "a")
    assert pruner.widths["heads.b.0"] < 10


@pytest.mark.parametrize("criterion", ["magnitude_l2", "bn_scale"])
def test_zeros_of_weights_are_scores(criterion):
    model = nn.Sequential(
        *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
    )
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight):
            tensor.zero_()
    pruner = tk.Pruner(model, torch.randn(4, 6), criterion, params=0.7, every=1, per_step=2)
    model(torch.randn(4, 6)).sum().backward()
    assert set(pruner.step().removed) == {"0"}


def test_a_resumed_run_knows_what_was_silent(tmp_path):
    """Saved between the two, and gone on with in another object, it prunes the same."""
    torch.manual_seed(3)
    options = dict(params=0.4, every=2, per_step=3)
    runs = []
    for resumed in (False, True):
        torch.manual_seed(5)
        model = Tasks()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        pruner = tk.Pruner(model, torch.randn(4, 6), optimizer=optimizer, **options)
        parts = dict(model=model, optimizer=optimizer, pruner=pruner)
        torch.manual_seed(6)
        with pytest.warns(UserWarning, match="so far are 0"):
            steps(5, model, pruner, "a")
        if resumed:
            tk.save_checkpoint(tmp_path / "run.ckpt", **parts)
            state = torch.get_rng_state()
            model = Tasks()
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            pruner = tk.Pruner(model, torch.randn(4, 6), optimizer=optimizer, **options)
            parts = dict(model=model, optimizer=optimizer, pruner=pruner)
            tk.load_checkpoint(tmp_path / "run.ckpt", **parts)
            torch.set_rng_state(state)
        while not pruner.done:
            step(model, pruner, "ab")
        runs.append([record.removed for record in pruner.history])
    assert runs[0] == runs[1]
