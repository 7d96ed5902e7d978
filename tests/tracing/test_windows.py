"""Windows of a sequence that overlap, by strides that code works out."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.zoo import judging


def windows(y: Tensor, width: int) -> Tensor:
    """Of a sequence [N, heads, steps, channels], [N, heads, windows, width, channels]."""
    n, heads, steps, channels = y.shape
    a, b, c, d = y.stride()
    half = width // 2
    return y.as_strided((n, heads, steps // half - 1, width, channels), (a, b, half * c, c, d))


class Local(nn.Module):
    """Attention within windows, between layers of convolutions."""

    def __init__(self, heads: int, size: int, laid_out: str) -> None:
        super().__init__()
        self.heads, self.laid_out = heads, laid_out
        self.q, self.k, self.v = (nn.Linear(3, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _ = x.shape
        layers = (self.q, self.k, self.v)
        q, k, v = (y(x).view(n, steps, self.heads, -1).transpose(1, 2) for y in layers)
        if self.laid_out == "copied":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        q, k, v = windows(q, 4), windows(k, 4), windows(v, 4)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.flatten(2, 3).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("laid_out", ["copied", "as it is"])
def test_heads_seen_through_windows_can_go(laid_out):
    heads, size = random.sample(range(3, 7), 2)
    model = Local(heads, size, laid_out).double()
    judging.check_all_but(["out"], model, torch.randn(2, 12, 3, dtype=torch.double))
    assert model.q.out_features < heads * size or model.v.out_features < heads * size


class Sliding(nn.Module):
    """Windows over channels see each of them several times."""

    def __init__(self, width: int, step: int) -> None:
        super().__init__()
        self.step = step
        self.read, self.body = nn.Linear(3, width), nn.Linear(4, 5)
        self.leave = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x).relu()
        count = (y.size(1) - 4) // self.step + 1
        parts = y.as_strided((len(y), count, 4), (y.stride(0), self.step, 1))
        return self.leave(self.body(parts).relu().sum(1))


@pytest.mark.parametrize("step", [1, 2, 4])
def test_channels_that_windows_cut_stay(step):
    model = Sliding(random.randint(2, 4) * 4, step)
    found = tk.trace(model, torch.randn(4, 3)).skipped
    assert list(found) == ["read", "leave"]
    assert "through windows (as_strided)" in found["read"]
