"""A network in float64 of which parameters are metered, and inputs of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

N = 4


def network() -> nn.Module:
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )
        .double()
        .eval()
    )


def images(n: int = N) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64)
