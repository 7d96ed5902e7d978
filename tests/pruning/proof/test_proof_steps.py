"""What the proof removes step after step, and that it tells code that depends on widths."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.proof.removal_steps import steps_of_groups, units_by_step
from taylor_kernels.tracing import trace
from tests.tracing.pieces import Apply


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 17, 64])
@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("minimum", [1, 3])
def test_units_go_once_and_what_stays_may_stay(size, multiple, minimum):
    group = Group((), (), torch.arange(size), (), multiple=multiple, minimum=minimum)
    object.__setattr__(group, "filters_per_unit", 1)
    first, most = group.next_to_go(size), group.most_removable(size)
    ways = set()
    for number in range(60):
        steps = units_by_step(group, number)
        assert steps.shape == (3, size)
        assert int(steps.sum(0).max()) <= 1
        total = int(steps.sum())
        assert (total > 0) == (first > 0)
        assert total <= min(max(size * 2 // 3, first), most)
        for count in steps.sum(1).cumsum(0).tolist():
            assert count == 0 or (count - first) % multiple == 0
        ways.add(tuple(steps.sum(1).tolist()))
        # Few units are dealt out; of more, middles are drawn.
        for other in (1, 2, 4) if first > 0 and size <= 5 else (1,) if first < total else ():
            later = units_by_step(group, number + other)
            same = torch.equal(later.sum(1), steps.sum(1))
            assert not same or (size <= 5 and number % 9 >= 9 - other)
    assert len(ways) > 1 or not first


#: Where code parts channels, by how many there are.
BOUNDARIES = [
    lambda c: c // 2,
    lambda c: c // 3,
    lambda c: 2 * c // 3,
    lambda c: c // 4,
    lambda c: c // 4 * 2,
    lambda c: c // 3 * 2,
    lambda c: (c // 2 + 1) // 2 * 2,
    lambda c: 1,
    lambda c: 2,
    lambda c: 4,
    lambda c: c - 1,
    lambda c: c - 2,
    lambda c: c - 3,
]


@pytest.mark.parametrize("size", range(7, 25))
def test_channels_that_pass_a_boundary_of_their_number_are_seen(size):
    """Whatever the group's number, channels that are left and not masked come to lie on the other
    side of most boundaries after some step."""
    group = Group((), (), torch.arange(size), ())
    object.__setattr__(group, "filters_per_unit", 1)
    seen = 0
    for number in range(24):
        steps = units_by_step(group, number)
        gone, stays = steps.cumsum(0).bool(), ~steps.any(0)
        assert int(stays.sum()) % 2 == 1 or size == 7
        assert steps.any(1).all()
        for boundary in BOUNDARIES:
            before = torch.arange(size) < boundary(size)
            seen += any(
                (((~off).cumsum(0) - 1 < boundary(int((~off).sum()))) != before)[stays].any()
                for off in gone
            )
    assert seen >= 0.9 * 24 * len(BOUNDARIES)


@pytest.mark.parametrize("apart", range(1, 5))
@pytest.mark.parametrize("heads", [3, 4, 5])
def test_as_many_heads_as_another_layer_has_left_are_no_chance(apart, heads):
    """Of layers that lie so far apart among those with as many heads, some lose other numbers."""
    group = Group((), (), torch.arange(heads), ())
    object.__setattr__(group, "filters_per_unit", 8)
    every = [units.sum(1).tolist() for units in steps_of_groups([group] * 24)]
    for begin in range(apart):
        assert len({tuple(steps) for steps in every[begin::apart]}) > 1


FAULTS = {
    "a constant width": lambda x: x.view(len(x), 8, 6, 6),
    "pairs": lambda x: x.view(len(x), x.size(1) // 2, 2, 6, 6).flatten(1, 2),
    "its place": lambda x: x * torch.arange(1.0, x.size(1) + 1).view(-1, 1, 1).to(x),
    "its place from behind": lambda x: x * torch.arange(x.size(1), 0.0, -1).view(-1, 1, 1).to(x),
    "how many there are": lambda x: x / x.size(1),
    "a threshold of width": lambda x: x if x.size(1) > 6 else -x,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(4))
def test_code_that_depends_on_a_width_is_found(fault, seed):
    """Wherever it is: the layer in front of it stays, and the others go."""
    draw = random.Random(f"{fault} {seed}")
    torch.manual_seed(seed)
    at, depth = draw.randrange(4), 4
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for number in range(depth):
        layers += [Apply(lambda s, x: FAULTS[fault](x)) if number == at else nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers)
    pruner = tk.Pruner(model, torch.randn(2, 3, 6, 6), "magnitude_l2", filters=0.5)
    assert set(pruner.skipped) == {str(2 * at), str(2 * depth)}


@pytest.mark.parametrize("seed", range(8))
def test_indices_after_a_removal_are_of_what_is_left(seed):
    """Removed one after the other, units take the same entries along as at once."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    norm = draw.choice([nn.LayerNorm(12), nn.Identity(), Apply(_normalised)])
    model = nn.Sequential(
        nn.Linear(4, 12), norm, nn.Linear(12, draw.choice([6, 12])), nn.ReLU(), nn.LazyLinear(3)
    )
    x = torch.randn(2, 4)
    model(x)
    channels = trace(model, x)
    first = [torch.rand(g.size) < 0.3 for g in channels.groups]
    then = [
        (torch.rand(g.size) < 0.4) & ~one for g, one in zip(channels.groups, first, strict=True)
    ]
    left = channels.without(first)
    later = [mask[~one] for mask, one in zip(then, first, strict=True)]
    for name, dims in left.entries(later).items():
        for dim, index in dims.items():
            assert torch.equal(channels.entries(then, first)[name][dim], index)
    assert channels.entries(then, first).keys() == left.entries(later).keys()
    expected = left.kept_by_norms(later)
    found = channels.kept_by_norms(then, first)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][1], expected[name][1]) for name in found)
    called = left.kept_by_called_norms(later), channels.kept_by_called_norms(then, first)
    torch.testing.assert_close(*called, rtol=0, atol=0)


def _normalised(_: nn.Module, x: Tensor) -> Tensor:
    """With a norm that code calls beside other things."""
    return x - functional.rms_norm(x, x.shape[-1:])


class Kept(nn.Module):
    """An answer in a tensor that no mode of PyTorch sees being made: float32 whatever runs."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 3)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        y = self.second(h) * (1 + self.slope * h.size(1))
        return torch.Tensor(*y.shape).copy_(y)


@pytest.mark.parametrize(("slope", "left"), [(0.0, ["first"]), (1e-3, [])])
def test_a_small_difference_shows_in_an_answer_of_single_precision_too(slope, left):
    model, x = Kept(slope), torch.randn(4, 5)
    assert len(trace(model, x).groups) == 1
    if not left:
        with pytest.raises(ValueError, match="mixes its channels"):
            tk.Pruner(model, x, params=0.5)
        return
    assert list(tk.Pruner(model, x, params=0.5).original_widths) == left


def test_a_trace_leaves_no_mark_of_a_global_hook():
    """torch.compile would warn of it."""
    trace(Kept(0.0), torch.randn(4, 5))
    assert not torch.nn.modules.module._has_any_global_hook()


def test_groups_of_one_size_lose_different_numbers_in_the_proof():
    """Code that takes one layer's width for another's is seen, though both lose half at most."""

    class Mistaken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.c(self.b(h).reshape(len(x), h.shape[1]))

    with pytest.raises(ValueError, match="nothing to prune") as found:
        tk.Pruner(Mistaken(), torch.randn(2, 4), filters=0.5)
    assert str(found.value).count("does not run without some of its channels") == 2
