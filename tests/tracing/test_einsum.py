"""Sizes that einsum works out for its own reshapes are no numbers that the code has written."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import judging


class LinearAttention(nn.Module):
    """Heads as wide as the stream over their number; products over positions come first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        shape = (n, steps, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        q, k = q.sigmoid(), k.sigmoid()
        mixed = torch.einsum("bhnd,bhne->bhde", k, v)
        scale = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        y = torch.einsum("bhnd,bhde,bhn->bhne", q, mixed, scale)
        return self.out(y.transpose(1, 2).reshape(n, steps, width))


class Filters(nn.Module):
    """A filter for each channel, made of a few states, as that of S4D."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, states))
        self.decay = nn.Parameter(torch.rand(width, states))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.size(1), dtype=x.dtype)
        kernel = torch.einsum("hn,hnl->hl", self.weight, torch.exp(-self.decay[..., None] * steps))
        return self.out(torch.tensordot(x * kernel.T, self.out.weight, ([2], [1])).tanh())


@pytest.mark.parametrize("kind", ["attention", "filters"])
def test_products_of_many_dimensions_keep_no_channel(kind):
    heads, width = random.randint(2, 4), random.randint(2, 4)
    stream = heads * width
    inner = LinearAttention(stream, heads) if kind == "attention" else Filters(stream, width)
    model = nn.Sequential(nn.Linear(5, stream), inner, nn.Linear(stream, 6), nn.Linear(6, 2))
    judging.check_all_but(["3"], model, torch.randn(2, 4, 5))
