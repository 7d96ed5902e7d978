"""Pruners of several models at a time leave each other's models alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.pruning import network


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 7), nn.Tanh(),
        nn.Linear(7, 2),
    ).double()  # fmt: skip


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    kinds: list[Callable] = [torch.optim.Adam, torch.optim.RMSprop, torch.optim.AdamW]
    return random.choice(kinds)(model.parameters(), lr=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: tk.Pruner | None) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 4).double()).square().sum().backward()
    if pruner is not None:
        pruner.step()
    optimizer.step()


def half_pruned(model: nn.Module, optimizer: torch.optim.Optimizer) -> tk.Pruner:
    x = torch.randn(3, 4).double()
    pruner = tk.Pruner(model, x, filters=0.5, every=1, per_step=2, optimizer=optimizer)
    for _ in range(3):
        train(model, optimizer, pruner)
    return pruner


@pytest.mark.parametrize("seed", range(3))
def test_a_step_of_another_thread_writes_nothing_into_a_model_that_is_cut(seed, monkeypatch):
    """In the middle of compact() a model has lost filters, and its masks still hold them."""
    torch.manual_seed(seed)
    model, other = net(random.randint(7, 12)), net(6)
    optimizer, others = optimizer_of(model), optimizer_of(other)
    pruner = half_pruned(model, optimizer)
    errors: list[Exception] = []

    def step_other() -> None:
        try:
            train(other, others, None)
        except Exception as error:
            errors.append(error)

    def removed(*given):
        remove(*given)
        thread = threading.Thread(target=step_other)
        thread.start()
        thread.join(60)

    remove = network.remove
    monkeypatch.setattr(network, "remove", removed)
    x = torch.randn(9, 4).double()
    masked = model.eval()(x).detach()
    pruner.compact()
    assert not errors
    torch.testing.assert_close(model(x).detach(), masked, rtol=1e-11, atol=1e-12)
    train(model.train(), optimizer, pruner)


def test_a_step_of_another_thread_keeps_its_own_masks():
    model = net(9)
    optimizer = optimizer_of(model)
    pruner = half_pruned(model, optimizer)
    off = model[0].weight.detach().abs().sum(1) == 0
    assert off.any()

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join(60)
    assert torch.equal(model[0].weight.detach().abs().sum(1) == 0, off)
    pruner.close()


def test_models_that_share_what_is_cut():
    shared, x = net(8), torch.randn(3, 4).double()
    one = nn.Sequential(shared, nn.Linear(2, 3)).double()
    two = nn.Sequential(shared, nn.ReLU(), nn.Linear(2, 5)).double()
    first = tk.Pruner(one, x, filters=0.5)
    with pytest.raises(ValueError, match=r"'0\.0\.weight' is a part of another model too"):
        tk.Pruner(two, x, filters=0.5)
    with pytest.raises(ValueError, match="is a part of another model too"):
        tk.Pruner(shared, x, filters=0.5)
    first.close()
    assert tk.Pruner(two, x, filters=0.5).widths
    # What both only read is no hindrance.
    left = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    right = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    right[1].bias = left[1].bias
    assert tk.Pruner(left, x, filters=0.5).widths == {"0": 6}
    assert tk.Pruner(right, x, filters=0.5).widths == {"0": 5}
