"""Widths that a module keeps in a list or tuple and cuts its channels by."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.tracing.removal import faults, removed


class Parts(nn.Module):
    """Cuts what a convolution gives by a list of widths, and puts it together in another order."""

    def __init__(self, widths: list[int] | tuple[int, ...], how: str) -> None:
        super().__init__()
        self.widths, self.how = widths, how
        self.enter = nn.Conv2d(3, sum(widths), 3, padding=1)
        self.bodies = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.how == "split":
            parts = x.split(list(self.widths), 1)
        elif self.how == "attribute":
            parts = x.split(self.widths, 1)
        else:
            parts, start = [], 0
            for width in self.widths:
                parts.append(x.narrow(1, start, width))
                start += width
        return torch.cat(
            [body(part).relu() for body, part in zip(self.bodies, parts, strict=True)], 1
        )


@pytest.mark.sample(12)
@pytest.mark.parametrize("how", ["split", "attribute", "narrow"])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("seed", range(4))
def test_widths_in_a_list_follow(how, kind, seed):
    rng = random.Random(seed)
    widths = kind(rng.choices([3, 4, 6, 7], k=rng.randint(2, 4)))
    model = nn.Sequential(Parts(widths, how), nn.Conv2d(4 * len(widths), 2, 1))
    inputs = torch.randn(1, 3, 4, 4)
    channels = trace(model, inputs)
    if how != "narrow":
        assert set(channels.skipped) == {"1"}
    assert not faults(model, inputs, channels)


def test_each_entry_counts_its_own_part_over_several_removals():
    model = nn.Sequential(Parts((5, 3, 5), "split"), nn.Conv2d(12, 2, 1))
    inputs = torch.randn(1, 3, 4, 4)
    channels = trace(model, inputs)
    widths = [5, 3, 5]
    for part, place in ((2, 0), (0, 0), (1, 1), (2, 1)):
        group = next(
            number for number, group in enumerate(channels.groups)
            if f"0.bodies.{part}" in {slot.owner for slot in group.slots if slot.side == "in"}
        )  # fmt: skip
        dead = [torch.zeros(group.size, dtype=torch.bool) for group in channels.groups]
        dead[group][place] = True
        model = removed(model, channels, dead)
        channels = channels.without(dead)
        widths[part] -= 1
        assert model[0].widths == tuple(widths)
        model(inputs)


@pytest.mark.parametrize("sizes", [(6, 2, 2), (5, 1, 1), (4, 4, 4), (2, 3, 1)])
def test_the_sizes_of_unflatten_follow(sizes):
    """As in decoders: a linear layer makes the first feature map."""
    model = nn.Sequential(
        nn.Linear(5, torch.Size(sizes).numel()),
        nn.Unflatten(1, sizes),
        nn.ConvTranspose2d(sizes[0], 3, 2),
    )
    inputs = torch.randn(2, 5)
    channels = trace(model, inputs)
    assert set(channels.skipped) == {"2"}
    assert not faults(model, inputs, channels)
    dead = torch.arange(sizes[0]) == 1
    assert channels.attributes([dead])["1"] == {"unflattened_size": (sizes[0] - 1, *sizes[1:])}


class Seen(nn.Module):
    """UNETR's tokens, seen as an image by a list of sizes; the width is an attribute besides."""

    def __init__(self, width: int, kind: type, shuffled: bool) -> None:
        super().__init__()
        self.hidden_size, self.shuffled = width, shuffled
        self.enter, self.leave = nn.Linear(4, width), nn.Conv2d(width, 2, 1)
        self.shape = kind([width, 2, 3] if shuffled else [2, 3, width])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.shuffled:
            return self.leave(x.transpose(1, 2).reshape([x.size(0), *self.shape]))
        return self.leave(x.view(x.size(0), *self.shape).permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_list_that_a_shape_is_given_by_follows_beside_an_attribute(kind, shuffled):
    model = Seen(7, kind, shuffled)
    inputs = torch.randn(1, 6, 4)
    channels = trace(model, inputs)
    assert set(channels.skipped) == {"leave"}
    assert not faults(model, inputs, channels)
    model = removed(model, channels, [torch.arange(7) < 3])
    assert model.shape == kind([4, 2, 3] if shuffled else [2, 3, 4])


class ByChance(nn.Module):
    """Cuts by a width, while a list that says something else holds the sizes of all parts."""

    def __init__(self, width: int, maps: int, lists: int, used: int) -> None:
        super().__init__()
        self.inner, self.levels, self.used = width, maps, used
        for number in range(lists):
            setattr(self, f"list{number}", [width, maps, width])
        self.enter, self.leave = nn.Linear(4, 2 * width + maps), nn.Linear(width, 3)
        self.gain = nn.Parameter(torch.rand(maps))

    def forward(self, x: Tensor) -> Tensor:
        sizes = getattr(self, f"list{self.used}", [self.inner, self.levels, self.inner])
        one, two, three = self.enter(x).split(sizes, -1)
        return self.leave(one.tanh() * three * (two * self.gain).sum(-1, keepdim=True))


@pytest.mark.parametrize(("lists", "used"), [(0, -1), (1, -1), (2, -1), (2, 0), (2, 1)])
@pytest.mark.parametrize(("width", "maps"), [(7, 4), (5, 3)])
def test_a_list_may_hold_the_sizes_of_parts_by_chance(width, maps, lists, used):
    pruner = tk.Pruner(
        nn.Sequential(ByChance(width, maps, lists, used)), torch.randn(2, 4), filters=0.9
    )
    assert pruner.widths == {"0.enter": 2 * width + maps}
