"""A small network that tests train by mirror descent, and every kind of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taylor_kernels.methods.mirror_settings import METHODS

#: All that there are: (method, levels).
KINDS = [
    (method, levels)
    for method in METHODS
    for levels in ("binary", "ternary")
    if (method, levels) != ("md-tanh", "ternary")
]


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


each_kind = pytest.mark.parametrize(("method", "levels"), KINDS)
FAST = dict(lr=0.02, beta_scale=1.2, beta_interval=3)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )  # fmt: skip


def train(model, optimizer, steps: int, seed: int = 0, scheduler=None, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(16, 2, 4, 4, generator=generator)
        y = torch.randint(5, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def quantized(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.dim() > 1]
