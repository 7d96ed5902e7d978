"""Where the proof refuses one way to cut attention into units, the other one is tried."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_kernels.pruning.proof.trial import Trial
from tests.zoo import judging


class Attend(nn.Module):
    """Attention of one packed layer, turned by positions that are as wide as a head.

    Args:
        by_number: code knows the number of heads, which no attribute holds, so that no head can go.
        scaled: the scale is computed from an attribute that counts the positions in a head, so that
            none of these can go.
    """

    def __init__(self, width: int, heads: int, dim: int, by_number: bool, scaled: bool) -> None:
        super().__init__()
        self.heads = lambda: heads
        self.head_dim, self.by_number, self.scaled = dim, by_number, scaled
        self.qkv, self.out = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        heads, qkv = self.heads(), self.qkv(x)
        if self.by_number:
            split = heads * self.head_dim
            parts = qkv[..., :split], qkv[..., split : 2 * split], qkv[..., 2 * split :]
        else:
            parts = qkv.chunk(3, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in parts)
        q, k = (turned(t, turns) for t in (q, k))
        scale = self.head_dim**-0.5 if self.scaled else 0.3
        y = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """As rotary embeddings of transformers do: the part behind the turned one may be empty."""
    width = turns.size(-1)
    head, rest = x[..., :width], x[..., width:]
    one, other = head.chunk(2, -1)
    return torch.cat([head * turns + torch.cat([-other, one], -1), rest], -1)


class Encoder(nn.Module):
    def __init__(self, heads: int, dim: int, by_number: bool, scaled: bool) -> None:
        super().__init__()
        width = random.randint(5, 9)
        self.read, self.leave = nn.Linear(3, width), nn.Linear(width, 2)
        self.turns = nn.Parameter(torch.randn(6, dim))
        self.layers = nn.ModuleList(Attend(width, heads, dim, by_number, scaled) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        for layer in self.layers:
            y = y + layer(y, self.turns)
        return self.leave(y)


@pytest.mark.parametrize(("by_number", "scaled"), [(True, False), (False, True)])
def test_the_axis_that_the_code_allows_is_found(by_number: bool, scaled: bool):
    heads, dim = random.choice([3, 5]), random.choice([4, 6])
    model = Encoder(heads, dim, by_number, scaled)
    judging.check_all_but(["leave"], model, torch.randn(1, 6, 3))
    for layer in model.layers:
        assert layer.out.in_features % (heads if by_number else dim) == 0


def test_what_no_choice_makes_right_stays():
    model = Encoder(3, 4, by_number=True, scaled=True)
    pruner, _ = judging.new_pruner(model, torch.randn(1, 6, 3), 0.95)
    assert set(pruner.skipped) == {"layers.0.qkv", "layers.1.qkv", "leave"}


class Setting:
    """Numbers of heads that all layers read, and none holds."""

    def __init__(self, queries: int, keys: int) -> None:
        self.queries, self.keys = queries, keys


class Packed(nn.Module):
    """Its code cuts a packed layer by the setting: without a head, what it gives to `out` is not as
    wide as `out` is."""

    def __init__(self, width: int, dim: int, setting: Setting) -> None:
        super().__init__()
        self.setting, self.head_dim, self.groups = setting, dim, setting.queries // setting.keys
        self.qkv = nn.Linear(width, (setting.queries + 2 * setting.keys) * dim)
        self.out = nn.Linear(setting.queries * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        shape, qkv = (*x.shape[:-1], -1, self.head_dim), self.qkv(x)
        end = self.setting.queries * self.head_dim
        both = self.setting.keys * self.head_dim
        parts = qkv[..., :end], qkv[..., end : end + both], qkv[..., end + both :]
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(self.groups, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_what_a_layer_is_given_is_sized_by_the_code_around_it(layers: int, monkeypatch):
    """The layer in which a trial fails has no code of its own, so that no other trial is needed."""
    faults: list[str] = []
    tried = Trial.fault

    def listed(*args: Any) -> str:
        faults.append(tried(*args))
        return faults[-1]

    monkeypatch.setattr(Trial, "fault", listed)
    width, dim, keys = random.randint(7, 11), random.choice([4, 6]), random.choice([2, 3])
    setting = Setting(2 * keys, keys)
    stream = (Packed(width, dim, setting) for _ in range(layers))
    model = nn.Sequential(nn.Linear(3, width), *stream, nn.Linear(width, 2))
    judging.check_all_but([str(layers + 1)], model, torch.randn(1, 6, 3))
    assert list(map(bool, faults)) == [True, False]
