"""Code that writes into its own parameters as it runs: each run of a proof starts from the same
values."""

from __future__ import annotations

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


def test_they_are_afterwards_what_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(Averaged(6), Doubled(6), nn.Linear(6, 3)).train()
    model[1].enter = nn.Linear(6, 6)
    before = [parameter.clone() for parameter in model.parameters()]
    judging.new_pruner(model, torch.randn(2, 6), 0.8)
    assert all(map(torch.equal, model.parameters(), before))


class Kept(nn.Module):
    """A buffer in whose place code puts its last features, however many examples there were."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, width), nn.Linear(width, 3)
        self.register_buffer("last", torch.zeros(2, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x).relu()
        self.last = y.detach()
        return self.leave(y)


def test_a_buffer_that_code_replaces_may_have_another_shape_each_time():
    model = Kept(random.randint(5, 9))
    pruner = tk.Pruner(model, torch.randn(2, 6), "random", filters=0.6, every=1)
    while not pruner.done:
        model(torch.randn(random.randint(1, 7), 6)).sum().backward()
        pruner.step()
    x = torch.randn(4, 6)
    before = model.eval()(x)
    torch.testing.assert_close(pruner.compact()(x), before)
    assert model.last.shape == (4, model.enter.out_features)
