"""Tied weights that code parts, and others that it ties, once there is a pruner."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk


class Language(nn.Module):
    """An embedding, a residual branch and a head, which may have the embedding's weight."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.branch = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + self.branch(y))


def prunings(tied: bool, done: int):
    model, x = Language(tied=tied).double(), torch.randint(9, (3, 4))
    options = {"params": 0.5, "every": 1, "per_step": 0.1}
    pruner = tk.Pruner(model, x, "magnitude_l2", **options)
    for _ in range(done):
        pruner.step()
    return model, x, pruner


def prune(pruner: tk.Pruner) -> None:
    while not pruner.done:
        pruner.step()


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("way", ["assign", "replace", "copy"])
def test_a_tie_that_is_broken_is_said_before_anything_is_cut(way, done):
    model, x, pruner = prunings(tied=True, done=done)
    if way == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    elif way == "replace":
        model.embed.weight = nn.Parameter(torch.randn_like(model.embed.weight))
    else:
        model.head = copy.deepcopy(model.head)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"were one tensor .* and are two now"):
        prune(pruner)
    if done:
        with pytest.raises(RuntimeError, match=r"head\.weight and embed\.weight"):
            pruner.compact()
    assert shapes == [p.shape for p in model.parameters()]
    model.head.weight = model.embed.weight
    prune(pruner)
    masked = model(x).detach()
    torch.testing.assert_close(pruner.compact()(x).detach(), masked)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("done", [0, 2])
def test_a_new_tie_is_said_too(done):
    model, _, pruner = prunings(tied=False, done=done)
    model.head.weight = model.embed.weight
    with pytest.raises(RuntimeError, match="have become one tensor since this pruner was made"):
        prune(pruner)


def test_both_anew_and_tied_again_is_no_change():
    model, x, pruner = prunings(tied=True, done=2)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.head.weight = model.embed.weight
    prune(pruner)
    masked = model(x).detach()
    torch.testing.assert_close(pruner.compact()(x).detach(), masked)


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
def test_a_norm_that_gates_are_read_at_has_to_stay(criterion):
    model = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh())
    model.append(nn.Linear(7, 2))
    x = torch.randn(5, 4)
    pruner = tk.Pruner(model, x, criterion, filters=0.5, every=1, per_step=1)
    model[1] = nn.BatchNorm1d(9)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="model: 1: other modules have been put there"):
        pruner.step()
    assert not pruner.history
