"""Layers whose weight a parametrization works out by products of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from taylor_kernels.tracing import trace
from tests.zoo import judging


class Mixed(nn.Module):
    """A square matrix from the left, or from the right."""

    def __init__(self, width: int, *, left: bool) -> None:
        super().__init__()
        self.matrix, self.left = nn.Parameter(torch.randn(width, width)), left

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.matrix @ weight if self.left else weight @ self.matrix


def _check(model: nn.Sequential, name: str) -> None:
    """The layer is counted as it counts its filters, and what is removed is what was masked."""
    x, layer = torch.randn(2, 4), model.get_submodule(name)
    inputs, outputs = trace(model, x).layers[name]
    assert inputs.numel() in (0, layer.in_features)
    assert outputs.numel() in (0, layer.out_features)
    pruner, optimizer = judging.new_pruner(model, x, 0.9, "magnitude_l2")
    assert pruner.widths.get(name, layer.out_features) == layer.out_features
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12


@pytest.mark.parametrize("left", [True, False])
def test_a_product_within_the_weight_is_not_the_layers(left):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU())
    model.extend([nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)])
    parametrize.register_parametrization(model[2], "weight", Mixed(7 if left else 9, left=left))
    _check(model, "2")


@pytest.mark.parametrize("outputs", [6, 9, 12])
def test_an_orthogonal_weight(outputs):
    torch.manual_seed(0)
    turned = parametrizations.orthogonal(nn.Linear(9, outputs))
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), turned, nn.Tanh(), nn.Linear(outputs, 5))
    model.extend([nn.ReLU(), nn.Linear(5, 3)])
    _check(model, "2")
