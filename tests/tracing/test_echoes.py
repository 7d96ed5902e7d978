"""Sizes that code takes from another tensor: what they count goes with that tensor's channels."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.tracing import trace
from tests.zoo import judging

#: Ways to write the width of one tensor into a reshape of another, which is as wide.
WAYS = {
    "reshape": lambda y, x: y.reshape(len(y), x.size(1), -1),
    "view": lambda y, x: y.contiguous().view(y.size(0), x.shape[1], -1),
    "constant batch": lambda y, x: y.reshape(-1, x.size(1), y.size(2) * y.size(3)),
    "split space": lambda y, x: y.reshape(*x.shape[:2], 2, -1).flatten(2),
}


class Reduced(nn.Module):
    """Layers one after another, each reshaped to the width that went into it."""

    def __init__(self, way, width, depth):
        super().__init__()
        self.way = way
        self.enter = nn.Conv2d(3, width, 1)
        self.layers = nn.ModuleList(Reduce(way, width) for _ in range(depth))
        self.leave = nn.Linear(width, 3)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x.mean((2, 3)))


class Reduce(nn.Module):
    def __init__(self, way, width):
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        y = self.way(self.conv(x).relu(), x)
        return y.unflatten(2, (-1, 4)).tanh()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_they_are_pruned_together(way, seed):
    draw = random.Random(f"{way} {seed}")
    torch.manual_seed(seed)
    model = Reduced(WAYS[way], draw.randint(5, 12), draw.randint(1, 3))
    x = torch.randn(1, 3, 4, 4)
    judging.check_all_but(["leave"], model, x)


class Beside(nn.Module):
    """Reductions, each with a convolution of the same width behind it that stays apart."""

    def __init__(self, way, width, depth):
        super().__init__()
        self.enter = nn.Conv2d(3, width, 1)
        self.layers = nn.ModuleList(Reduce(way, width) for _ in range(depth))
        self.others = nn.ModuleList(Own(width) for _ in range(depth))
        self.leave = nn.Linear(width, 3)

    def forward(self, x):
        x = self.enter(x)
        for layer, other in zip(self.layers, self.others, strict=True):
            x = other(layer(x))
        return self.leave(x.mean((2, 3)))


class Own(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.conv(x).flatten(2).unflatten(2, (-1, 4)).relu()


@pytest.mark.parametrize("way", WAYS)
def test_only_code_that_takes_them_couples(way, monkeypatch):
    """And it is found without a search: layers that are as wide by chance go as they are ranked."""
    torch.manual_seed(0)
    depth = 4
    model, x = Beside(WAYS[way], 9, depth), torch.randn(1, 3, 4, 4)
    trials = []
    run = Trial.fault
    monkeypatch.setattr(
        Trial,
        "fault",
        lambda self, *args, **kw: trials.append(args) or run(self, *args, **kw),
    )
    pruner, optimizer = judging.new_pruner(model, x, 0.6)
    assert len(trials) <= 6
    groups = [{slot.owner for slot in group.producers} for group in pruner._prunable.groups]
    before = ["enter", *(f"others.{n}.conv" for n in range(depth - 1))]
    together = [{name, f"layers.{n}.conv"} for n, name in enumerate(before)]
    assert sorted(map(sorted, groups)) == sorted(
        map(sorted, [*together, {f"others.{depth - 1}.conv"}])
    )
    assert judging.prune(model, x, pruner, optimizer).error < 1e-12


def test_a_size_of_ones_own_couples_nothing():
    model = Reduced(lambda y, x: y.reshape(len(y), y.size(1), -1), 8, 2)
    x = torch.randn(1, 3, 4, 4)
    pruner, _ = judging.new_pruner(model, x, 0.6)
    assert list(pruner.skipped) == ["leave"]
    # Each layer's filters go as they are ranked, in a group of their own.
    assert len(pruner._prunable.groups) == 3
    assert trace(model, x).coupled(model, ["leave"]) is None


#: Ways to cut queries, keys and values into heads, given what made all three and the stream.
CUTS = {
    "split by the stream's width": lambda a, qkv, x: [
        part.view(*x.shape[:2], a.heads, x.size(-1) // a.heads).transpose(1, 2)
        for part in qkv.split(x.size(-1), dim=2)
    ],
    "one reshape": lambda a, qkv, x: (
        qkv.reshape(*x.shape[:2], 3, a.heads, x.size(-1) // a.heads).permute(2, 0, 3, 1, 4).unbind()
    ),
    "each by itself": lambda a, qkv, x: [
        part.view(*x.shape[:2], a.heads, x.size(-1) // a.heads).transpose(1, 2)
        for part in qkv.chunk(3, dim=2)
    ],
    "chunks": lambda a, qkv, x: [
        part.view(*x.shape[:2], a.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
    ],
}


class Attention(nn.Module):
    """As nanoGPT and timm write it: heads are put side by side as wide as the stream."""

    def __init__(self, heads, head_size, cut, inferred=False):
        super().__init__()
        width = heads * head_size
        self.heads, self.cut, self.inferred = heads, cut, inferred
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.cut(self, self.qkv(x), x)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        side_by_side = -1 if self.inferred else width
        return x + self.out(y.transpose(1, 2).reshape(batch, length, side_by_side))


#: Where PyTorch works out the width of heads side by side, only how they are cut ties them.
@pytest.mark.parametrize(
    ("cut", "inferred"),
    [*((cut, False) for cut in CUTS), *((cut, True) for cut in CUTS if cut != "chunks")],
)
@pytest.mark.parametrize("seed", range(2))
def test_heads_go_with_channels_of_the_stream(cut, inferred, seed):
    draw = random.Random(f"{cut} {seed}")
    torch.manual_seed(seed)
    heads, size, layers = draw.randint(4, 6), draw.randint(2, 5), draw.randint(1, 3)
    model = nn.Sequential(nn.Embedding(9, heads * size))
    model.extend(Attention(heads, size, CUTS[cut], inferred) for _ in range(layers))
    model.append(nn.Linear(heads * size, 3))
    tokens = torch.randint(9, (1, 5))
    pruner, optimizer = judging.new_pruner(model, tokens, 0.6)
    assert list(pruner.skipped) == [f"{layers + 1}"]
    verdict = judging.prune(model, tokens, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
    # As many heads have gone from every layer, each with as many channels as it has.
    assert {layer.heads for layer in model[1:-1]} == {model[0].embedding_dim // size}
    assert model[1].heads < heads


class NonLocal(nn.Module):
    """One attribute is the width of queries and keys, and of values, which nothing else ties."""

    def __init__(self, width, inner):
        super().__init__()
        self.inter_channels = inner
        self.theta, self.phi, self.g = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.back = nn.Conv2d(inner, width, 1)

    def forward(self, x):
        flat = (len(x), self.inter_channels, -1)
        theta, phi, g = (layer(x).view(*flat) for layer in (self.theta, self.phi, self.g))
        y = (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        y = y.transpose(1, 2).contiguous().view(len(x), self.inter_channels, *x.shape[2:])
        return x + self.back(y)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_an_attribute_that_sizes_several_tensors_ties_them(blocks, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width, inner = draw.randint(6, 9), draw.randint(3, 5)
    model = nn.Sequential(
        nn.Conv2d(3, width, 1),
        *(NonLocal(width, inner) for _ in range(blocks)),
        nn.Conv2d(width, 2, 1),
    )
    x = torch.randn(1, 3, 4, 4)
    pruner, optimizer = judging.new_pruner(model, x, 0.6)
    assert list(pruner.skipped) == [f"{blocks + 1}"]
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
    for block in model[1:-1]:
        assert block.inter_channels == block.g.out_channels == block.phi.out_channels


class Checked(nn.Module):
    """Refuses inputs of another width than it was made for; a name says which width that is."""

    def __init__(self, name, inputs, outputs, deep=0):
        super().__init__()
        self.conv, self.name = nn.Conv2d(inputs, outputs, 1), name
        for _ in range(deep):
            self.conv = nn.Sequential(
                self.conv, nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 1)
            )
        setattr(self, name, inputs)

    def forward(self, x):
        if x.shape[1] != getattr(self, self.name):
            raise ValueError(f"{x.shape[1]} channels, not {getattr(self, self.name)}")
        return self.conv(x).tanh()


@pytest.mark.parametrize("name", ["num_channels", "in_planes", "hidden_dim", "width"])
@pytest.mark.parametrize("seed", range(3))
def test_an_attribute_that_the_input_is_compared_with_follows_it(name, seed):
    """The layer that reads it may be inside of other modules."""
    draw = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    first, second = draw.sample(range(5, 12), 2)
    parts = [Checked(name, 3, first), Checked(name, first, second, seed), nn.Conv2d(second, 2, 1)]
    judging.check_all_but(["2"], nn.Sequential(*parts), torch.randn(1, 3, 4, 4))


class CheckedNorm(nn.Module):
    """A norm across channels that refuses other widths, with or without a gain."""

    def __init__(self, name, width, gain):
        super().__init__()
        self.name, self.gain = name, nn.Parameter(torch.ones(width)) if gain else 1.0
        setattr(self, name, width)

    def forward(self, x):
        assert x.size(-1) == getattr(self, self.name)
        return x * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * self.gain


@pytest.mark.parametrize("name", ["dim_norm", "num_features", "hidden_size"])
@pytest.mark.parametrize("gain", [True, False])
def test_a_norm_that_checks_its_width_is_told_of_it(name, gain):
    draw = random.Random(f"{name} {gain}")
    torch.manual_seed(0)
    first, second = draw.sample(range(5, 12), 2)
    model = nn.Sequential(
        *(nn.Linear(4, first), CheckedNorm(name, first, gain), nn.Linear(first, second)),
        *(CheckedNorm(name, second, gain), nn.Linear(second, 3)),
    )
    judging.check_all_but(["4"], model, torch.randn(3, 4))


class ByChance(Reduce):
    """An attribute has the size that the code takes from its input, and counts nothing."""

    def __init__(self, way, width):
        super().__init__(way, width)
        self.spare_width = width


@pytest.mark.parametrize("way", ["reshape", "view", "constant batch"])
@pytest.mark.parametrize("seed", range(2))
def test_an_attribute_of_this_size_by_chance_hides_no_tensor(way, seed):
    draw = random.Random(f"{way} {seed}")
    torch.manual_seed(seed)
    model = Reduced(WAYS[way], draw.randint(5, 12), 0)
    model.layers.append(ByChance(WAYS[way], model.enter.out_channels))
    judging.check_all_but(["leave"], model, torch.randn(1, 3, 4, 4))
