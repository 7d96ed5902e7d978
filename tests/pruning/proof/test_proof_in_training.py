"""Code that runs in train mode alone and counts channels in a way that no run shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk


def halves(y: Tensor, width: int) -> Tensor:
    return torch.cat([y[:, : width // 2].relu(), y[:, width // 2 :].sigmoid()], 1)


def shuffled(y: Tensor, width: int) -> Tensor:
    return y.view(-1, 2, width // 2).transpose(1, 2).reshape(-1, width)


def rolled(y: Tensor, width: int) -> Tensor:
    return torch.cat([y[:, width // 2 :], y[:, : width // 2]], 1)


def in_rows(y: Tensor, width: int) -> Tensor:
    return nn.functional.dropout(y.view(-1, 2, width // 2), 0.5).flatten(1)


class InTraining(nn.Module):
    """A layer whose output goes through a function in train mode, with a probability."""

    def __init__(self, width: int, function, probability: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, width), nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(width)
        self.width, self.function, self.probability = str(width), function, probability

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.enter(x))
        if self.training and (self.probability == 1 or torch.rand(()) < self.probability):
            y = self.function(y, int(self.width))
        return self.leave(y.tanh())


@pytest.mark.sample(10)
@pytest.mark.parametrize("probability", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("function", [halves, shuffled, rolled, in_rows])
@pytest.mark.parametrize("width", [6, 8])
def test_its_channels_stay(width, function, probability):
    """Were they to go, a masked model would train otherwise than one without them, or fail."""
    torch.manual_seed(width)
    model = nn.Sequential(InTraining(width, function, probability), nn.Tanh(), nn.Linear(3, 2))
    pruner = tk.Pruner(model, torch.randn(4, 5), filters=0.7)
    assert pruner.widths == {"0.leave": 3}


@pytest.mark.parametrize("probability", [1.0, 0.5])
@pytest.mark.parametrize("function", [lambda y, _: y.roll(1, 0), lambda y, _: y * (y > 0)])
def test_what_counts_none_lets_them_go(function, probability):
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    model = InTraining(8, function, probability).double()
    pruner = tk.Pruner(model, x, filters=0.5, every=1, per_step=2)
    assert pruner.widths == {"enter": 8}
    while not pruner.done:
        model(x).square().mean().backward()
        pruner.step()
    outputs = []
    for _ in range(2):
        for seed in range(4):
            torch.manual_seed(seed)
            outputs.append(model(x))
        pruner.compact()
    torch.testing.assert_close(outputs[:4], outputs[4:], rtol=1e-11, atol=1e-12)
