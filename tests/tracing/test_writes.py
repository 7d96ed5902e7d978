"""Writes into parts of tensors: through views, masks and indices."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_kernels.tracing import trace
from tests.tracing.parts import Apply
from tests.tracing.removal import faults
from tests.tracing.test_rules import read
from tests.zoo import judging


def _one_place(made, write):
    """A tensor of one value that code made, with something written into a part of it."""

    def function(s, x):
        made_ = made(x)
        write(made_)
        return x * made_

    return function


#: Tensors as wide as x whose places are all alike.
EVEN = {
    "ones": lambda x: torch.ones(x.shape, dtype=x.dtype),
    "new_zeros": lambda x: x.new_zeros(x.size(-1)),
    "expanded": lambda x: torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None].expand_as(x).clone(),
    "repeated": lambda x: torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None].repeat(1, x.size(1)),
}
#: What makes them differ from place to place.
WRITES = {
    "item": lambda made: made[..., 0].fill_(5),
    "slice": lambda made: made[..., :2].add_(1),
    "transposed": lambda made: made.mT[:2].mul_(3.0) if made.dim() > 1 else made[:2].sub_(3.0),
    "index": lambda made: made.index_fill_(-1, torch.tensor([1]), 3.0),
    "put": lambda made: made.__setitem__((..., torch.tensor([2])), 3.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("made", EVEN)
def test_a_part_that_is_written_is_no_longer_like_the_others(made, write):
    units, _ = read(_one_place(EVEN[made], WRITES[write]))
    assert units == 0


@pytest.mark.parametrize("made", EVEN)
def test_what_code_made_of_one_value_follows_any_width(made):
    assert read(_one_place(EVEN[made], lambda made: made.mul_(2)))[0] == 8


def _filled_by_halves(s, x):
    half, y = x.size(1) // 2, torch.zeros(x.shape, dtype=x.dtype)
    y[:, :half], y[:, half:] = x[:, half:], x[:, :half]
    return y + s.other(x)


def test_zeros_that_are_filled_with_channels_go_with_them():
    units, _ = read(_filled_by_halves, other=nn.Linear(8, 8))
    assert units == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.masked_fill((torch.arange(len(x))[:, None] > 0).expand_as(x), 0.5),
        lambda s, x: x.clone().masked_fill_(x < 0, -0.1),
        lambda s, x: _put(x, x < 0, -0.1),
        lambda s, x: torch.zeros_like(x).index_add(0, torch.tensor([2, 0, 2]), x),
        lambda s, x: x.new_zeros(4, x.size(1)).index_copy(0, torch.tensor([3, 0, 2]), x),
        lambda s, x: torch.zeros_like(x).scatter_add(
            0, torch.tensor([[2], [0], [2]]).expand_as(x), x
        ),
        lambda s, x: _put(x.new_zeros(5, x.size(1)), torch.tensor([4, 0, 1]), x),
        lambda s, x: _put(torch.zeros_like(x), torch.tensor([True, False, True]), x[:2]),
        lambda s, x: _put(torch.zeros_like(x), torch.tensor([1]), s.other(x)[:1]) + x,
        lambda s, x: torch.view_as_real(torch.complex(x, s.other(x))).sum(-1),
        lambda s, x: torch.vmap(s.other)(x).relu() + x,
    ],
)  # fmt: skip
def test_places_of_other_dimensions_may_be_named_by_number(function):
    assert read(function, other=nn.Linear(8, 8))[0] == 8


def _put(tensor, index, values):
    tensor = tensor.clone()
    tensor[index] = values
    return tensor


#: Masks of two of three rows that are 8 wide.
ROWS = {
    "one column": lambda x: torch.tensor([True, False, True])[:, None],
    "expanded": lambda x: torch.tensor([False, True, True])[:, None].expand_as(x),
    "copied": lambda x: torch.tensor([True, True, False])[:, None].expand_as(x).clone(),
}


@pytest.mark.parametrize("mask", ROWS)
def test_rows_of_another_tensor_go_where_a_mask_says(mask):
    """As where a language model's tokens make room for those of images."""
    units, _ = read(
        lambda s, x: x.masked_scatter(ROWS[mask](x), s.other(x).relu()[:2]), other=nn.Linear(8, 8)
    )
    assert units == 8


def test_rows_in_several_dimensions_go_where_a_mask_says():
    def function(s, x):
        room = x[None].expand(2, *x.shape).unflatten(2, (2, -1))
        mask = torch.tensor([[True, False, True], [False, True, False]])[..., None, None]
        return room.masked_scatter(mask, s.other(x).unflatten(1, (2, -1))).sum(0).flatten(1)

    assert read(function, other=nn.Linear(8, 8))[0] > 1


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.masked_scatter(torch.arange(8) > 3, s.four(x)),
        lambda s, x: x.masked_scatter(torch.arange(3)[:, None] > 0, s.four(x.repeat(3, 1))),
        lambda s, x: x.masked_scatter(x > 0, torch.ones(24, dtype=x.dtype)),
    ],
)
def test_entries_that_a_mask_names_one_by_one_stay(function):
    assert read(function, four=nn.Linear(8, 4))[0] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x.index_add(1, torch.tensor([0, 5]), s.two(x)),
        lambda s, x: x.scatter(1, torch.zeros(len(x), 1, dtype=torch.long), 2.0),
        lambda s, x: x.index_fill(1, torch.tensor([1, 3]), 0.0),
        lambda s, x: _put(x.mT, torch.tensor([1, 3]), s.two(x).mT).mT,
    ],
)
def test_channels_named_by_number_stay(function):
    units, reason = read(function, two=nn.Linear(8, 2))
    assert units == 0
    assert "is written by its number" in reason


def test_a_norm_given_statistics_of_one_value():
    def norm(s, x):
        zeros, ones = torch.zeros(s.wide, dtype=x.dtype), torch.ones(s.wide, dtype=x.dtype)
        return F.batch_norm(x, zeros, ones, s.gain, s.shift)

    gain, shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))
    middle = Apply(norm, gain=gain, shift=shift)
    middle.wide = 8
    model = nn.Sequential(nn.Linear(5, 8), middle, nn.Linear(8, 2))
    channels = trace(model, torch.randn(3, 5))
    assert channels.groups[0].size == 8
    assert not faults(model, torch.randn(3, 5), channels)


def test_a_script_module_keeps_its_mode():
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
    model = nn.Sequential(nn.Linear(3, 4), script, nn.Linear(4, 2))
    script.eval()
    script[1].train()
    before = [module.training for module in model.modules()]
    trace(model, torch.randn(2, 3))
    assert [module.training for module in model.modules()] == before


class Filled(nn.Module):
    """Zeros that are filled part by part, and seen with another shape then, as Longformer does."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.values, self.out = nn.Linear(5, heads * width), nn.Linear(heads * width, 7)
        self.down = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _ = x.shape
        y = self.values(x).view(n, steps, self.heads, self.width).transpose(1, 2).softmax(-1)
        rows = y.reshape(n * self.heads, steps, self.width)
        out = rows.new_zeros(n * self.heads, steps + 1, self.width)
        out[:, 1:] = rows
        out[:, 0] = rows[:, -1]
        y = out.view(n, self.heads, steps + 1, self.width)[:, :, :-1].transpose(1, 2)
        return self.down(self.out(y.reshape(n, steps, self.heads * self.width)).relu())


def test_zeros_that_were_filled_are_no_constant_for_a_reshape():
    # No two sizes are the same by chance, as those of two examples of two heads and a width of 4.
    heads, width = random.choice([3, 5]), random.choice([2, 4])
    judging.check_all_but(["down"], Filled(heads, width), torch.randn(2, 7, 5))
