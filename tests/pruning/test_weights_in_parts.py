"""Layers whose weight code uses in slices, as networks that run at several widths do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk


class Sliced(nn.Module):
    """A layer whose first outputs, last ones, or both are computed by themselves."""

    def __init__(self, kind: type[nn.Module], way: str) -> None:
        super().__init__()
        self.kind, self.way, self.half = kind, way, 6
        more = (1,) if kind is nn.Conv2d else ()
        self.enter, self.layer = kind(3, 8, *more), kind(8, 12, *more)
        self.leave = nn.Linear(6, 2)

    def part(self, h: Tensor, rows: slice) -> Tensor:
        run = F.conv2d if self.kind is nn.Conv2d else F.linear
        return run(h, self.layer.weight[rows], self.layer.bias[rows])

    def forward(self, x: Tensor) -> Tensor:
        h, first, last = self.enter(x).tanh(), slice(self.half), slice(self.half, None)
        if self.way == "first":
            h = self.part(h, first)
        elif self.way == "halves":
            h = self.part(h, first) * self.part(h, last).sigmoid()
        elif self.way == "part, then whole":
            h = self.part(h, first) + self.layer(h)[:, self.half :]
        else:
            h = self.layer(h)[:, : self.half] - self.part(h, last)
        return self.leave(h.tanh().flatten(2).mean(2) if h.dim() > 2 else h.tanh())


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "taylor_fo"])
@pytest.mark.parametrize("way", ["first", "halves", "part, then whole", "whole, then part"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_layer_has_all_its_filters_where_a_slice_of_its_weight_runs(kind, way, criterion):
    model = Sliced(kind, way).double()
    x = torch.randn(5, 3, *((2, 2) if kind is nn.Conv2d else ()), dtype=torch.float64)
    pruner = tk.Pruner(model, x, criterion, filters=0.7, every=1, per_step=3)
    assert pruner.original_widths["layer"] == 12
    while not pruner.done:
        model(torch.randn_like(x)).square().sum().backward()
        pruner.step()
    masked = model(x).detach()
    pruner.compact()
    assert pruner.widths["layer"] == len(model.layer.weight)
    torch.testing.assert_close(model(x).detach(), masked)
