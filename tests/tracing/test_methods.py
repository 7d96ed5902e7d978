"""Sizes that code has from attributes of a module of which other modules call methods."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.zoo import judging


class Part(nn.Module):
    """It is never called itself; `width` and `heads` are its own alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads

    def in_heads(self, y: Tensor) -> Tensor:
        y = y.view(len(y), self.heads, self.width // self.heads)
        return (y * y.sigmoid().sum(-1, keepdim=True)).flatten(1)

    def added(self, y: Tensor) -> Tensor:
        order = torch.arange(len(y)).flip(0)
        return torch.zeros(len(y), self.width, dtype=y.dtype).index_add(0, order, y)

    def copied(self, y: Tensor) -> Tensor:
        rows = torch.zeros(len(y), self.width, dtype=y.dtype)
        rows[torch.arange(len(y))] = y
        return rows

    def both(self, y: Tensor) -> Tensor:
        """Two places that the attribute is written at, which meet later."""
        return self.added(y) + self.copied(y.tanh())

    def helped(self, y: Tensor) -> Tensor:
        return sum((piece for piece in [self.added(y)]), y)


class Caller(nn.Module):
    def __init__(self, part: Part, method: str, nested: bool) -> None:
        super().__init__()
        self.part, self.method = part, method
        self.read, self.leave = nn.Linear(3, part.width), nn.Linear(part.width, 2)
        self.middle = Between(part, method) if nested else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x).tanh()
        y = getattr(self.part, self.method)(y) if self.middle is None else self.middle(y)
        return self.leave(y)


class Between(nn.Module):
    """A module that runs has another's width, and calls the part's method."""

    def __init__(self, part: Part, method: str) -> None:
        super().__init__()
        self.others = [part]  # not one of its own modules
        self.method, self.size = method, part.width

    def forward(self, y: Tensor) -> Tensor:
        return getattr(self.others[0], self.method)(y)


METHODS: list[Callable] = [Part.in_heads, Part.added, Part.copied, Part.both, Part.helped]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", [m.__name__ for m in METHODS])
def test_they_follow_what_is_left(method, nested):
    heads = random.randint(2, 4)
    part = Part(heads * random.randint(2, 4), heads)
    model, x = Caller(part, method, nested), torch.randn(5, 3)
    width = part.width
    found = tk.trace(model, x)
    assert list(found.skipped) == ["leave"]
    judging.check_all_but(["leave"], model, x)
    assert part.width == model.read.out_features < width
