"""Difficult operations, one small network each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from taylor_kernels.tracing import trace
from tests.tracing.parts import Apply
from tests.tracing.removal import faults


class Through(nn.Module):
    """Linear layers before and behind a function of [N, 8] (or more) features."""

    def __init__(self, function, width: int = 8, **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.enter = nn.Linear(5, width)
        with torch.no_grad():
            self.middle = Apply(function, **modules)
            behind = self.middle(self.enter(torch.randn(3, 5))).shape[-1]
        self.leave = nn.Linear(behind, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x)))


def read(function, width: int = 8, **modules):
    """Units of the first layer that can go, and why others cannot; what is offered is proven."""
    model = Through(function, width, **modules)
    inputs = torch.randn(3, 5)
    channels = trace(model, inputs)
    assert not faults(model, inputs, channels)
    units = sum(g.size for g in channels.groups if any(s.owner == "enter" for s in g.producers))
    return units, channels.skipped.get("enter", "")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def in_place_on_view(self, x):
    x = x * 1
    x[:, : x.shape[1] // 2].mul_(2)
    return x


def written_into_view(self, x):
    out = torch.zeros_like(x)
    out[:, :] = x.relu()
    return out


def rows(like):
    """A table of four rows that no parameter has made."""
    return torch.arange(24, dtype=like.dtype).view(4, 6)


def filled_in_place(self, x):
    x = x * 1
    x[0] = 3.0
    x[1:].zero_()
    return x


def written_into_zeros(self, x):
    out = torch.zeros(len(x), 2, x.shape[1], dtype=x.dtype)
    out[:, 0] = x
    out[:, 1] = x.tanh()
    return out.sum(1)


def out_argument(self, x):
    out = torch.empty(0, dtype=x.dtype)
    torch.mul(x, x, out=out)
    return out


def transposed_in_place(self, x):
    x = x.clone()
    x.t_()
    return x.relu_().t()


def view_of_view(self, x):
    y = x.clone()
    y.view(len(x), -1, 1)[:, :, 0].add_(x)
    return y


def written_by_two_numbers(self, x):
    rows = torch.zeros(4, 5, x.size(1), dtype=x.dtype)
    rows[torch.tensor([3, 0]), torch.tensor([[1], [4]])] = x[:2]
    return rows.sum(1)[:3]


def written_apart(self, x):
    rows = torch.zeros(4, x.size(1), 5, dtype=x.dtype)
    rows[torch.tensor([3, 0]), :, torch.tensor([1, 4])] = x[:2]
    return rows.sum(2)[:3]


def drawn_and_rated(self, x):
    given = torch.distributions.Normal(x, x.exp())
    return given.log_prob(given.stddev.detach()) * given.mean


def depthwise_by_function(self, x):
    """As in Mamba: a function takes the layer's weight as a matrix."""
    weight = self.inner.weight.squeeze(1).unsqueeze(1)
    y = F.conv1d(x[..., None], weight, self.inner.bias, padding=1, groups=x.shape[1])
    return y.mean(-1)


GO = {
    "gathered_elsewhere": (
        lambda s, x: x.gather(0, torch.arange(len(x))[:, None].flip(0).expand(-1, x.size(1))),
        8,
    ),
    "gathered_in_order": (lambda s, x: x.gather(1, torch.arange(x.size(1)).expand_as(x)), 8),
    "selected_in_order": (lambda s, x: x.index_select(-1, torch.arange(x.size(1))), 8),
    "in_place_on_view": (in_place_on_view, 4),
    "written_into_view": (written_into_view, 8),
    "written_into_zeros": (written_into_zeros, 8),
    "filled_in_place": (filled_in_place, 8),
    "out_argument": (out_argument, 8),
    "transposed_in_place": (transposed_in_place, 8),
    "view_of_view": (view_of_view, 8),
    "expand": (lambda s, x: x[:, :, None].expand(-1, -1, 4).sum(2), 8),
    "repeat": (lambda s, x: x.repeat(1, 2), 8),
    "repeat_interleave": (lambda s, x: x.repeat_interleave(2, 1), 8),
    "flip": (lambda s, x: x.flip(1), 8),
    "padded_more_before": (lambda s, x: F.pad(x, (3, 1)), 8),
    "where": (lambda s, x: torch.where(x > 0, x, 0.1 * x), 8),
    "masked_fill": (lambda s, x: x.masked_fill(x < 0, 0.0), 8),
    "cat_of_many": (lambda s, x: torch.cat([x] * 9, 1), 8),
    "einsum": (lambda s, x: torch.einsum("nc,mc->nm", x, x) @ x, 8),
    "bilinear": (lambda s, x: s.form(x, x.tanh()), 8),
    "bilinear_of_a_parameter": (lambda s, x: F.bilinear(x[None], x[None], s.table)[0], 8),
    "distances": (lambda s, x: torch.cdist(x, s.table), 8),
    "distances_of_many": (
        lambda s, x: torch.cdist(x.relu()[None], s.table.expand(2, -1, -1)).sum(0),
        8,
    ),
    "depthwise_by_function": (depthwise_by_function, 8),
    "distribution": (drawn_and_rated, 8),
    "dtype": (lambda s, x: x.float().to(x.dtype), 8),
    "custom_function": (lambda s, x: Doubled.apply(x), 8),
    "checkpoint": (lambda s, x: checkpoint(torch.relu, x, use_reentrant=False), 8),
    "reentrant_checkpoint": (lambda s, x: checkpoint(torch.relu, x, use_reentrant=True), 8),
    "detach_and_data": (lambda s, x: x.detach().data + x, 8),
    "batch_index": (lambda s, x: x[torch.tensor([2, 0])], 8),
    "batch_mask": (lambda s, x: x[torch.tensor([True, False, True])], 8),
    "data_dependent": (lambda s, x: x.relu() if x.sum() > -1e9 else x[:, :3], 8),
    "gate_of_one": (lambda s, x: x * s.gate(x).sigmoid(), 8),
    "unbound_batch": (lambda s, x: torch.stack(list(x.unbind(0))), 8),
    "row_of_buffer": (lambda s, x: x + s.table[2], 8),
    "nested": (lambda s, x: s.inner(x).reshape(len(x), 2, -1).sum(1), 6),
    "no_grad": (lambda s, x: torch.no_grad()(torch.relu)(x), 8),
    "unfold": (lambda s, x: F.unfold(x[:, :, None, None].expand(-1, -1, 2, 2), 2).flatten(1), 8),
    "max": (lambda s, x: x - x.max(1, keepdim=True)[0], 8),
    "written_by_two_numbers": (written_by_two_numbers, 8),
    "mean_thrown_away": (lambda s, x: (x.relu(), x.mean(1)[:, None].expand(-1, 3))[0], 8),
    "pooled_rows": (lambda s, x: F.avg_pool2d(x[None], (2, 1), (1, 1))[0], 8),
    "greatest_rows": (lambda s, x: F.max_pool2d(x[None], (3, 1), 1, (1, 0))[0], 8),
    "empty_slice": (lambda s, x: torch.cat([x.relu(), x[:, x.size(1) :]], 1), 8),
    "inference_mode": (lambda s, x: torch.inference_mode()(torch.relu)(x).clone(), 8),
}
EXTRA = {
    "mean": {"inner": nn.Linear(8, 8)},
    "mean_through_views": {"inner": nn.Linear(8, 8)},
    "gate_of_one": {"gate": nn.Linear(8, 1)},
    "row_of_buffer": {"table": nn.Parameter(torch.randn(4, 8))},
    "nested": {"inner": nn.Linear(8, 6)},
    "bilinear": {"form": nn.Bilinear(8, 8, 6)},
    "bilinear_of_a_parameter": {"table": nn.Parameter(torch.randn(6, 8, 8))},
    "depthwise_by_function": {"inner": nn.Conv1d(8, 8, 3, groups=8)},
    "distances": {"table": nn.Parameter(torch.randn(40, 8))},
    "distances_of_many": {"table": nn.Parameter(torch.randn(3, 8))},
}


@pytest.mark.parametrize("name", GO)
def test_channels_that_can_go(name):
    function, units = GO[name]
    if name == "nested":
        units = 8
    assert read(function, **EXTRA.get(name, {})) == (units, "")


STAY = {
    "index_select": (lambda s, x: x.index_select(1, torch.tensor([3, 1, 1])), "index_select"),
    "gathered_to_fewer": (
        lambda s, x: x.gather(0, torch.zeros(2, 3, dtype=torch.int64)).sum(0), "gather",
    ),
    "first_selected": (lambda s, x: x.index_select(1, torch.arange(2)), "index_select"),
    "gather": (lambda s, x: x.gather(1, torch.tensor([[0], [1], [2]])), "gather"),
    "advanced": (lambda s, x: x[:, [0, 2]], "index"),
    "roll": (lambda s, x: x.roll(1, 1), "roll"),
    "softmax": (lambda s, x: x.softmax(1), "softmax"),
    "fft": (lambda s, x: torch.fft.fft(x, dim=1).real, "fft"),
    "written_apart": (written_apart, "index_put"),
    "mean_through_views": (
        lambda s, x: s.inner(x) - x.mean(1).unsqueeze(0).transpose(0, 1), "mean",
    ),
    "pool": (lambda s, x: F.avg_pool2d(x[None], (1, 2), (1, 1))[0], "avg_pool2d"),
    "padded_pool": (lambda s, x: F.max_pool1d(x[None], 3, 1, 1)[0], "max_pool1d"),
    "sort": (lambda s, x: x.sort(1)[0], "sort"),
    "cummax": (lambda s, x: x.cummax(1)[0], "cummax"),
    "mean": (lambda s, x: s.inner(x) - x.mean(1, keepdim=True), "mean"),
    "cumsum": (lambda s, x: x.cumsum(1), "cumsum"),
    "by_position": (lambda s, x: x * torch.arange(8.0), "mul"),
    "sine_positions": (lambda s, x: x + torch.arange(x.shape[1]).sin(), "follows no parameter"),
    "position_test": (
        lambda s, x: torch.where(torch.arange(x.shape[1]) < 4, x.relu(), x.sigmoid()), "where",
    ),
    "unknown": (lambda s, x: torch.pdist(x).sum() * x, "pdist"),
    "distances": (lambda s, x: torch.cdist(x.sigmoid(), x) @ x, "cdist"),
    "layer_norm": (lambda s, x: F.layer_norm(x, (8,)), "layer_norm"),
    "uneven_slice": (lambda s, x: torch.cat([x[:, :3].relu(), x[:, 3:]], 1), "slice"),
    "bilinear": (lambda s, x: F.bilinear(x, x, x.new_ones(3, 8, 8)), "bilinear"),
    "rows_of_a_bag": (lambda s, x: F.embedding_bag((9 * x).long() % 4, rows(x)), "embedding_bag"),
    "weights_of_a_bag": (
        lambda s, x: F.embedding_bag(
            torch.arange(8).expand(len(x), -1) % 4, rows(x), mode="sum",
            per_sample_weights=x.sigmoid(),
        ),
        "embedding_bag",
    ),
    "square": (lambda s, x: x.sigmoid() @ x.sigmoid().t() @ x, "matmul"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_channels_that_stay_say_why(name):
    function, operation = STAY[name]
    units, reason = read(function, **EXTRA.get(name, {}))
    assert units == 0
    assert operation in reason
    assert "middle" in reason


def test_numpy_round_trip_is_no_way_out():
    units, reason = read(lambda s, x: torch.from_numpy(x.detach().numpy() * 2))
    assert units == 0
    assert "numpy" in reason


def test_autocast():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert trace(model, torch.randn(2, 4)).groups[0].size == 6


def test_norms_behind_a_layer_are_named_in_order():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.AvgPool2d(2), nn.BatchNorm2d(8),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    channels = trace(model, torch.randn(2, 3, 9, 9))
    assert channels.groups[0].norms == ("2", "4")
