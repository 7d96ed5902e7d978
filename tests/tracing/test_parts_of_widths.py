"""A dimension cut at places that code works out from its width: an attribute's, or `chunk`'s."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taylor_kernels.tracing import trace
from tests.tracing.removal import faults, noisy, wrong
from tests.zoo.judging import check_all_but


def _cut(y: Tensor, width: int, count: int, how: str) -> list[Tensor]:
    size = width // count
    if how == "split":
        return list(y.split(size, 1))
    if how == "narrow":
        return [y.narrow(1, n * size, size) for n in range(count)]
    return [y[:, n * size : (n + 1) * size] for n in range(count)]


class CrossStage(nn.Module):
    """CSPNet's: one part of a wide layer goes through blocks, the others go past them.

    Its attribute says how wide the layer is, and its code how wide a part is. What is handed a part
    of a wrong width is a layer in a module in a module.
    """

    def __init__(self, width: int, count: int, how: str) -> None:
        super().__init__()
        self.wide, self.count, self.how = width * count, count, how
        self.expand = nn.Sequential(nn.Conv2d(width, self.wide, 1), nn.BatchNorm2d(self.wide))
        self.blocks = nn.Sequential(Bottleneck(width), Bottleneck(width))
        self.leave = nn.Conv2d(self.wide, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        *past, last = _cut(self.expand(x).relu(), self.wide, self.count, self.how)
        return self.leave(torch.cat([*past, self.blocks(last)], 1))


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.ReLU())
        self.leave = nn.Conv2d(width // 2, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.enter(x))


@pytest.mark.parametrize("how", ["split", "narrow", "slices"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_part_of_what_an_attribute_counts(count, how):
    torch.manual_seed(count)
    stage = CrossStage(6, count, how)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), stage, nn.Flatten(), nn.Linear(6 * 9, 4))
    check_all_but(["3"], model, torch.randn(2, 3, 5, 5))


class Scales(nn.Module):
    """EdgeNeXt's: parts of a stream, the last of which may be shorter, each but one with a
    convolution of its own and with what came of the one before."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        size = -(-width // count)
        self.layers = nn.ModuleList(
            nn.Conv2d(size, size, 3, padding=1, groups=size) for _ in range(count - 1)
        )
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = x.chunk(len(self.layers) + 1, 1)
        found: list[Tensor] = []
        for part, layer in zip(parts, self.layers, strict=True):
            found.append(layer(part + found[-1] if found else part))
        return x + self.mix(torch.cat([*found, last], 1)).relu()


def _uneven(width: int, count: int) -> bool:
    """Whether `chunk` makes as many parts as it is asked for, of which the last is shorter; it has
    two places, as the last of them stays."""
    size = -(-width // count)
    return 2 <= width - size * (count - 1) < size


@given(
    sizes=st.tuples(st.integers(5, 23), st.integers(2, 5)).filter(lambda both: _uneven(*both)),
    blocks=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12)
def test_the_last_of_the_parts_that_chunk_makes_may_be_shorter(sizes, blocks, seed):
    torch.manual_seed(seed)
    width, count = sizes
    stages = [Scales(width, count) for _ in range(blocks)]
    model = nn.Sequential(nn.Conv2d(3, width, 1), *stages, nn.Flatten(), nn.Linear(width * 9, 4))
    x = torch.randn(2, 3, 3, 3)
    channels = trace(model, x)
    assert not faults(model, x, channels)
    assert set(channels.skipped) == {str(len(model) - 1)}
    # The width may go down until what is left has one of each kind of unit.
    assert not wrong(
        *noisy(model, x), channels, [torch.arange(g.size) > 0 for g in channels.groups]
    )


class CrossCovariance(nn.Module):
    """EdgeNeXt's attention across channels: heads are put side by side to the stream's width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        n, tokens, width = y.shape
        q, k, v = self.qkv(y).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        attended = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).permute(0, 3, 1, 2)
        y = y + self.leave(attended.reshape(n, tokens, width))
        return y.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(("width", "heads", "count"), [(24, 4, 3), (22, 2, 3), (24, 8, 3)])
def test_as_many_channels_go_as_heads_have_where_not_the_same_can(width, heads, count):
    """The stream goes in sets of one place of each part, which are no heads."""
    torch.manual_seed(width)
    stages = [
        Scales(width, count), CrossCovariance(width, heads),
        Scales(width, count), CrossCovariance(width, heads),
    ]  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, width, 1), *stages, nn.Flatten(), nn.Linear(width * 9, 4))
    check_all_but(["6"], model, torch.randn(2, 3, 3, 3))
