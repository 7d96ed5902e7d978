"""What code does at the fewest channels of all, which the proof's own steps leave more of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.tracing.pieces import Apply


class Folded(nn.Module):
    """Some channels are moved back, as many forth, and the others stay: as many as an attribute
    says by chance.

    Args:
        by: what the width is divided by, or how many stay where one is moved each way.
    """

    def __init__(self, by: int, *, constant: bool) -> None:
        super().__init__()
        self.by, self.constant = by, constant

    def forward(self, y: Tensor) -> Tensor:
        fold = 1 if self.constant else y.shape[1] // self.by
        out = torch.zeros_like(y)
        out[:, :fold, 1:] = y[:, :fold, :-1]
        out[:, fold : 2 * fold, :-1] = y[:, fold : 2 * fold, 1:]
        out[:, 2 * fold :] = y[:, 2 * fold :]
        return out


def network(by: int, *, constant: bool) -> nn.Module:
    folded, width = Folded(by, constant=constant), by + 2
    return nn.Sequential(
        *(nn.Conv1d(2, width, 1), folded, nn.Conv1d(width, 8, 2), nn.Flatten(), nn.Tanh()),
        nn.Linear(8 * 5, 2),
    ).double()


@pytest.mark.parametrize("by", [3, 4, 5])
def test_a_fraction_of_few_channels_that_only_the_last_ones_change(by):
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    assert "0" in tk.Pruner(network(by, constant=False), x, filters=0.9).skipped


@pytest.mark.parametrize("by", [3, 4, 5])
def test_beside_a_constant_number_of_them_one_may_stay_alone(by):
    model = network(by, constant=True)
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    pruner = tk.Pruner(model, x, "random", filters=3 / (by + 2), ignore=["2"], every=1)
    while not pruner.done:
        pruner.step()
    masked = model(x).detach()
    pruner.compact()
    torch.testing.assert_close(model(x).detach(), masked)


#: Ways to drop the places of an image of one pixel.
SQUEEZES = [
    lambda _, y: y.squeeze(),
    lambda _, y: torch.squeeze(y),
    lambda _, y: y.clone().squeeze_(),
    lambda _, y: y.squeeze((1, 2, 3)),
    lambda _, y: y.squeeze(3).squeeze(2).squeeze(1),
]


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("round_to", [1, 3])
def test_a_squeeze_leaves_no_channel_alone(squeeze, round_to):
    width = 9
    tail = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 2))
    model = nn.Sequential(nn.Conv2d(3, width, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
    model = (model + nn.Sequential(Apply(squeeze)) + tail).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    least = max(2, round_to)
    options = {"ignore": ["4"], "round_to": round_to, "every": 1, "per_step": 2}
    with pytest.raises(ValueError, match=f"{least / width:.4f}"[:4]):
        tk.Pruner(model, x, "random", filters=0.01, **options)
    pruner = tk.Pruner(model, x, "random", filters=least / width + 1e-6, **options)
    while not pruner.done:
        pruner.step()
    masked = model(x).detach()
    pruner.compact()
    assert pruner.widths == {"0": least}
    torch.testing.assert_close(model(x).detach(), masked)


@pytest.mark.parametrize(
    "squeeze",
    [lambda _, y: y.squeeze(3), lambda _, y: torch.cat([y, -y], 1).squeeze()[:, : y.shape[1]]],
)
def test_a_squeeze_that_leaves_the_dimension_may_leave_one(squeeze):
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.AdaptiveAvgPool2d(1), Apply(squeeze))
    model += nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    pruner = tk.Pruner(model, torch.randn(2, 3, 4, 4), "random", filters=0.2, every=1)
    while not pruner.done:
        pruner.step()
    assert pruner.widths == {"0": 1}
