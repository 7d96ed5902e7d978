"""What a unit is, as table and picture say it, is what its channels are."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from taylor_kernels.tracing import trace
from tests.tracing.pieces import Apply, Attention, halves, shuffle

Built = tuple[list[nn.Module], int, int, str, str]


def attention(how: str, heads: int, shared: int, said: str) -> Callable[[int], Built]:
    def build(size: int) -> Built:
        name = "1.qkv" if how == "packed" else "1.q"
        body = Attention(8, heads, shared, size, how)
        words = said.format(heads=heads, size=size, served=heads // shared, wide=shared * size)
        return [body], 8, 8, name, words

    return build


def between(
    made: Callable[[int], nn.Module], said: str, enter: int, leave: int
) -> Callable[[int], Built]:
    """Of `enter` channels for each of a few, said of the layer before."""
    return lambda size: (
        [made(size)], enter * size, leave * size, "0", said.format(size=size, twice=2 * size)
    )  # fmt: skip


#: Each a part of a network by a number of channels, and what is said of a unit of a layer.
SAID: dict[str, Callable[[int], Built]] = {
    "heads": attention("plain", 4, 1, "a head: a whole part of {heads} x {size}"),
    "heads that share keys": attention("plain", 4, 2, "a head: a whole part of {served} x {wide}"),
    "packed heads": attention("packed", 4, 1, "a head: {size} in a row of each of 3 parts"),
    "one key of all heads": attention("fused", 2, 2, "the same place of each of 2 heads"),
    "gated linear unit": between(
        lambda size: nn.GLU(1), "the same place of each of 2 parts", 2, 1
    ),
    "pixel shuffle": between(
        lambda size: nn.PixelShuffle(2), "a whole part of {size} x 4", 4, 1
    ),
    "neighbours": between(
        lambda size: Apply(lambda s, x: x.reshape(len(x), -1, 2, *x.shape[2:]).amax(2)),
        "a whole part of {size} x 2", 2, 1,
    ),
    "groups of a convolution": between(
        lambda size: nn.Conv2d(2 * size, 2 * size, 1, groups=2),
        "the same place of each of 2 parts", 2, 2,
    ),
    "shuffled": between(
        lambda size: Apply(shuffle(2)), "the same place of each of 2 parts", 2, 2
    ),
    "channels by themselves": between(lambda size: nn.PReLU(size), "a channel", 1, 1),
    "halves that go again as they came": between(
        lambda size: Apply(halves), "the same place of each of 2 parts", 2, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_a_unit_is_what_it_is_said_to_be(case, tmp_path):
    body, enter, leave, name, words = SAID[case](random.choice([3, 5, 7]))
    model = nn.Sequential(nn.Conv2d(3, enter, 1), *body, nn.Conv2d(leave, 2, 1))
    channels = trace(model, torch.randn(1, 3, 4, 6))
    group = next(group for group in channels.groups if group.name == name)
    lines = " ".join(channels.table().split())
    assert re.search(rf"{name} {group.size} units of \d+ \({re.escape(words)}\) ", lines)
    page = channels.show(tmp_path / "channels.html").read_text()
    assert f"{name}: {group.size} units, each {words}<" in page.replace(", normalised", "<")


def test_places_without_an_order_are_counted():
    """Three channels of one unit, of two parts that are not alike."""

    def joined(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        half = x.size(1) // 3
        return x[:, :half] + x[:, half : 2 * half] + x[:, 2 * half :].flip(1)

    model = nn.Sequential(nn.Conv2d(3, 9, 1), Apply(joined), nn.Conv2d(3, 2, 1))
    assert "3 units of    3 (3 channels)" in trace(model, torch.randn(1, 3, 4, 6)).table()
