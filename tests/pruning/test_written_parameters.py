"""Code that writes into its own parameters as it runs: each run of a proof starts from the same
values."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.zoo import judging


class Averaged(nn.Module):
    """A slow copy of a layer, an average of its weights over training steps, runs beside it."""

    def __init__(self, width):
        super().__init__()
        self.fast, self.slow = nn.Linear(6, width), nn.Linear(6, width).requires_grad_(False)

    def forward(self, x):
        if self.training:
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                slow.data.mul_(0.5).add_(fast.data, alpha=0.5)
        return self.fast(x).relu() + self.slow(x).tanh()


class Codebook(nn.Module):
    """Each input is replaced by its nearest code, and codes move to where inputs are."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.codes = nn.Linear(6, width), nn.Parameter(torch.randn(7, 4), False)
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)
        self.register_buffer("counts", torch.ones(7))

    def forward(self, x):
        y = self.down(self.enter(x).relu())
        nearest = torch.cdist(y, self.codes).argmin(-1)
        found = self.codes[nearest]
        if self.training:
            hits = nn.functional.one_hot(nearest.flatten(), 7).to(y)
            self.counts.data.mul_(0.9).add_(hits.sum(0))
            moved = (hits.T @ y.detach().flatten(0, -2)) / self.counts[:, None]
            self.codes.data.mul_(0.9).add_(moved)
        return self.up(y + (found - y).detach())


class Doubled(nn.Module):
    """Another memory for a parameter at every step, as max-norm constraints give it."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.gain = nn.Linear(6, width), nn.Parameter(torch.rand(1))

    def forward(self, x):
        if self.training:
            self.gain.data = self.gain.data * 2
        return self.enter(x).relu() * self.gain


@pytest.mark.parametrize("kind", [Averaged, Codebook, Doubled])
@pytest.mark.parametrize("seed", range(2))
def test_all_but_what_reaches_the_output_goes(kind, seed):
    draw = random.Random(f"{kind.__name__} {seed}")
    torch.manual_seed(seed)
    width = draw.randint(5, 12)
    model = nn.Sequential(kind(width), nn.Linear(width, 3))
    judging.check_all_but(["1"], model, torch.randn(2, 6))


class Kept(nn.Module):
    """A buffer in whose place code puts what it has just worked out."""

    def __init__(self, width, of, training_only):
        super().__init__()
        self.enter, self.of, self.training_only = nn.Linear(6, width), of, training_only
        self.register_buffer("last", torch.zeros(width))

    def forward(self, x):
        y = self.enter(x).relu()
        if self.training or not self.training_only:
            with torch.no_grad():
                self.last = self.enter.weight.square().sum(1) if self.of == "weight" else y.mean(0)
        return y


@pytest.mark.parametrize("training_only", [False, True])
@pytest.mark.parametrize("of", ["weight", "features"])
def test_a_buffer_is_cut_as_what_takes_its_place(of, training_only, tmp_path):
    model = nn.Sequential(Kept(7, of, training_only), nn.Linear(7, 3))
    other = copy.deepcopy(model)

    def new_pruner(model):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        return tk.Pruner(
            model, torch.randn(2, 6), "random", filters=0.5, every=1, optimizer=optimizer
        )

    pruner = new_pruner(model)
    while not pruner.done:
        pruner.step()
    pruner.compact()
    left = model[0].enter.out_features
    assert model[0].last.shape == (left,)
    before = model.train()(torch.ones(2, 6))
    assert model[0].last.shape == (left,)
    tk.save_checkpoint(tmp_path / "file", model=model, pruner=pruner)
    tk.load_checkpoint(tmp_path / "file", model=other, pruner=new_pruner(other))
    assert torch.equal(other[0].last, model[0].last)
    assert torch.equal(other(torch.ones(2, 6)), before)


def test_they_are_afterwards_what_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(Averaged(6), Doubled(6), nn.Linear(6, 3)).train()
    model[1].enter = nn.Linear(6, 6)
    before = [parameter.clone() for parameter in model.parameters()]
    judging.new_pruner(model, torch.randn(2, 6), 0.8)
    assert all(map(torch.equal, model.parameters(), before))
