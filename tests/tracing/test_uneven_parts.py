"""A dimension split into unlike parts: some as wide as other tensors, some constant."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.tracing.removal import faults


class Modulation(nn.Module):
    """FocalNet's and MobileViTv2's: one layer makes a stream or more, and a few maps beside it.

    Args:
        source: says how wide a part that is none of the maps is.
        how: takes the parts: "split", "narrow", or slices, whose last one has an end or has none.
    """

    def __init__(self, width: int, maps: int, order: list[str], source: str, how: str) -> None:
        super().__init__()
        self.order, self.source, self.how = order, source, how
        self.levels = list(range(maps))
        if source == "attribute":
            self.width = width
        streams = order.count("stream")
        self.enter = nn.Linear(width, streams * width + maps * order.count("maps"))
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1] if self.source == "input" else self.width
        sizes = [width if part == "stream" else len(self.levels) for part in self.order]
        total = torch.ones_like(x)
        for part, name in zip(parts(self.enter(x), sizes, self.how), self.order, strict=True):
            total = total * (part.tanh() if name == "stream" else part.sigmoid().sum(-1, True))
        return self.leave(total)


def parts(y: Tensor, sizes: list[int], how: str) -> Sequence[Tensor]:
    """Parts of these sizes along the last dimension."""
    if how == "split":
        return y.split(sizes, -1)
    ends = [0, *accumulate(sizes)]
    if how == "narrow":
        return [y.narrow(-1, start, stop - start) for start, stop in pairwise(ends)]
    last = None if how == "open" else ends[-1]
    return [y[..., a:b] for a, b in pairwise([*ends[:-1], last])]


def network(width: int, maps: int, order: list[str], source: str, how: str) -> nn.Module:
    middle = Modulation(width, maps, order, source, how)
    return nn.Sequential(nn.Linear(5, width), middle, nn.ReLU(), nn.Linear(width, 3))


ORDERS = st.permutations(["stream", "stream", "maps"]) | st.permutations(["stream", "maps"])


@given(
    width=st.integers(5, 14),
    maps=st.integers(1, 4),
    order=ORDERS,
    source=st.sampled_from(["input", "attribute"]),
    how=st.sampled_from(["split", "narrow", "slices", "open"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=9)
def test_what_is_as_wide_as_the_stream_goes_with_it(width, maps, order, source, how, seed):
    torch.manual_seed(seed)
    model, x = network(width, maps, order, source, how), torch.randn(2, 4, 5)
    channels = trace(model, x)
    assert not faults(model, x, channels)
    assert set(channels.skipped) == {"3"}
    rows = [s.index for g in channels.groups for s in g.producers if s.owner == "1.enter"]
    assert sum(index.numel() for index in rows) == order.count("stream") * width


class FromTheEnd(Modulation):
    """A stream, what it leaves, and a few maps that are counted from the end."""

    def forward(self, x: Tensor) -> Tensor:
        y, width, maps = self.enter(x), x.shape[-1], len(self.levels)
        one, two, gates = y[..., :width], y[..., width:-maps], y[..., -maps:]
        return self.leave(one.tanh() * two * gates.sigmoid().sum(-1, True))


@pytest.mark.parametrize(("width", "maps"), [(7, 2), (9, 4), (6, 1)])
def test_what_slices_leave_is_free(width, maps):
    torch.manual_seed(width)
    middle = FromTheEnd(width, maps, ["stream", "stream", "maps"], "input", "")
    model = nn.Sequential(nn.Linear(5, width), middle, nn.ReLU(), nn.Linear(width, 3))
    x = torch.randn(2, 4, 5)
    channels = trace(model, x)
    assert not faults(model, x, channels)
    assert set(channels.skipped) == {"3"}


class Beside(nn.Module):
    """A stream as wide as the input and three channels more, all of which go on."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 11), nn.Linear(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.enter(x).split([x.shape[-1], 3], -1)
        return self.leave(torch.cat([one.tanh() * x, two], -1))


def test_the_constant_part_stays_and_says_why():
    model, x = nn.Sequential(nn.Linear(5, 8), Beside(), nn.Linear(8, 3)), torch.randn(2, 5)
    channels = trace(model, x)
    assert not faults(model, x, channels)
    entered = channels.layers["1.enter"][1].tolist()
    reasons = [str(channels.reason(number) or "") for number in entered]
    assert not any(reasons[:8])
    assert all("is one of a constant number of channels" in reason for reason in reasons[8:])


@pytest.mark.parametrize("sizes", [(8, 3), (3, 8), (1, 8)])
def test_sizes_written_as_numbers_are_found_by_the_proof(sizes):
    """As wide as the input by chance, or by the author's will: the proof tells."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 11 if 3 in sizes else 9), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            one, two = sorted(self.enter(x).split(list(sizes), -1), key=lambda part: part.shape[-1])
            return self.leave(two * one.mean(-1, keepdim=True))

    model = nn.Sequential(nn.Linear(5, 8), Written(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    pruner = tk.Pruner(model, torch.randn(2, 5), filters=0.9)
    assert set(pruner.widths) <= {"2", "1.leave"}
