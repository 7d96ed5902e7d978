"""Heads that code puts beside the examples in one dimension: of any number of examples the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.tracing import Channels, trace
from tests.tracing.removal import faults
from tests.zoo.judging import check_all_but


class Attention(nn.Module):
    """BoTNet's: channels come first, and what is a head of which example is one dimension.

    Args:
        back: makes of heads and their values one dimension: with the examples in front, in two
            steps, or by an attribute of their width.
    """

    def __init__(self, width: int, heads: int, keys: int, values: int, back: str) -> None:
        super().__init__()
        self.heads, self.keys, self.values, self.back = heads, keys, values, back
        self.all_keys, self.all_values = heads * keys, heads * values
        self.scale = keys**-0.5
        self.qkv = nn.Conv2d(width, 2 * heads * keys + heads * values, 1)
        self.offsets = nn.Parameter(torch.randn(5, keys))

    def forward(self, x: Tensor) -> Tensor:
        n, _, *places = x.shape
        q, k, v = self.qkv(x).split([self.all_keys, self.all_keys, self.all_values], 1)
        q = q.reshape(n * self.heads, self.keys, -1).transpose(1, 2)
        k = k.reshape(n * self.heads, self.keys, -1)
        v = v.reshape(n * self.heads, self.values, -1).transpose(1, 2)
        bias = (q @ self.offsets.transpose(0, 1)).mean(2, keepdim=True)
        y = ((q @ k * self.scale + bias.tanh() * q.sum(2, True)).softmax(2) @ v).transpose(1, 2)
        if self.back == "attribute":
            return y.reshape(n, self.all_values, *places)
        if self.back == "steps":
            return y.reshape(n, self.heads, self.values, -1).flatten(1, 2).unflatten(2, places)
        return y.reshape(n, -1, *places)


def _network(heads: int, keys: int, values: int, back: str) -> nn.Module:
    torch.manual_seed(heads)
    return nn.Sequential(
        nn.Conv2d(3, 10, 1), nn.ReLU(), Attention(10, heads, keys, values, back),
        nn.BatchNorm2d(heads * values), nn.ReLU(), nn.Conv2d(heads * values, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def _groups(channels: Channels) -> list[list[tuple[str, str, list[list[int]]]]]:
    return [
        [(slot.owner, slot.side, slot.index.tolist()) for slot in group.slots]
        for group in channels.groups
    ]


@pytest.mark.parametrize("back", ["attribute", "steps", "inferred"])
@pytest.mark.parametrize(("heads", "keys", "values"), [(4, 6, 6), (3, 7, 5), (2, 4, 8)])
def test_the_number_of_examples_does_not_matter(heads, keys, values, back):
    model = _network(heads, keys, values, back)
    found = []
    for examples in (1, 2, 3):
        x = torch.randn(examples, 3, 3, 5)
        channels = trace(model, x)
        assert not faults(model, x, channels)
        found.append(_groups(channels))
    assert found[0] == found[1] == found[2]
    assert any(owner == "2.qkv" for group in found[0] for owner, *_ in group)


def test_heads_go():
    check_all_but(["5", "2.offsets"], _network(4, 6, 5, "attribute"), torch.randn(2, 3, 3, 5))
