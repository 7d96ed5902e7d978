"""GroupNorm of as many groups as channels: each channel is normalised by itself, and can go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo import judging


class Alone(nn.Module):
    """A class of one's own that does the same, its width in an attribute or in the code."""

    def __init__(self, width: int, *, counted: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.width = width if counted else -width

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x, abs(self.width), self.weight, self.bias)


def network(width: int, norm: nn.Module) -> nn.Module:
    stem = [nn.Conv1d(1, width, 3, padding=1), norm, nn.GELU()]
    return nn.Sequential(
        *stem, nn.Conv1d(width, 6, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 3)
    )


@pytest.mark.parametrize("width", [2, 5, 12])
@pytest.mark.parametrize("affine", [True, False])
def test_its_channels_go_as_those_of_an_instance_norm(width, affine):
    torch.manual_seed(width)
    model = network(width, nn.GroupNorm(width, width, affine=affine))
    pruner, optimizer = judging.new_pruner(model, torch.randn(1, 1, 10), 0.6)
    assert list(pruner.skipped) == ["6"]
    assert judging.prune(model, torch.randn(2, 1, 10), pruner, optimizer).error < 1e-12
    assert model[1].num_groups == model[1].num_channels == model[0].out_channels


def test_a_class_of_ones_own_has_to_say_how_many_there_are():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 10)
    judging.check_all_but(["6"], network(9, Alone(9, counted=True)), x)
    pruner, _ = judging.new_pruner(network(9, Alone(9, counted=False)), x, 0.9)
    assert "0" in pruner.skipped
