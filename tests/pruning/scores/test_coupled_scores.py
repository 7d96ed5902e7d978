"""How the filters of one unit become one score, and what scores are ranked against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.pruning import Pruner
from tests.helpers import zoo


class Skip(nn.Module):
    """`first` and `second` add into one stream of 6 channels; `alone` has 8 of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.alone = nn.Conv2d(6, 8, 1)
        self.second = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(x + self.second(self.alone(x).relu()))


def pruned_once(importance: str | tk.Criterion, model: nn.Module, **options) -> Pruner:
    inputs = torch.randn(4, 3, 5, 5)
    pruner = Pruner(model, inputs, importance, filters=0.3, every=1, momentum=0.0, **options)
    zoo.loss(model, inputs).backward()
    pruner.step()
    return pruner


def survivors(scores: Tensor) -> Tensor:
    return scores[~scores.isnan()]


@pytest.mark.parametrize(
    ("coupled", "combine"),
    [
        ("sum", lambda a, b: a + b),
        ("mean", lambda a, b: (a + b) / 2),
        ("first", lambda a, b: a),
    ],
)
def test_rows_of_coupled_filters_become_one(coupled, combine):
    model = Skip()
    rows = [
        layer.weight.detach().square().flatten(1).sum(1) for layer in (model.first, model.second)
    ]
    criterion = tk.Criterion("squares", "magnitudes", lambda t: t[:, 1].sqrt(), coupled)
    pruner = pruned_once(criterion, model, per_step=1)
    expected = combine(*rows).sqrt()  # the rows are combined, then scored
    for layer in ("first", "second"):
        got = pruner.scores()[layer]
        alive = ~got.isnan()
        torch.testing.assert_close(got[alive], expected[alive], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="coupled: 'max' is not one of"):
        tk.Criterion("x", "magnitudes", lambda t: t[:, 0], "max")


def test_the_control_draws_uniformly_for_units_however_many_layers_they_span():
    pruner = pruned_once("random", Skip(), per_step=1)
    draws = survivors(torch.cat([pruner.scores()["first"], pruner.scores()["alone"]]))
    assert draws.unique().numel() == draws.numel()
    assert draws.max() < 1.0


@pytest.mark.parametrize("across_layers", [True, False])
def test_norms_are_ranked_relative_to_their_layer(across_layers):
    """With one layer's weights all 100 times smaller, a raw norm takes that layer alone."""
    torch.manual_seed(0)
    model = Skip()
    with torch.no_grad():
        model.alone.weight.mul_(0.01)
    criterion = tk.Criterion("norm", "magnitudes", lambda t: t[:, 1], "mean", across_layers)
    pruner = pruned_once(criterion, model, per_step=6)
    widths = pruner.widths
    if across_layers:
        assert widths["alone"] == 2
        assert widths["first"] == 6
    else:
        assert widths["alone"] > 2
        assert widths["first"] < 6
    assert not get_criterion("magnitude_l2").across_layers
    assert get_criterion("taylor_fo_bn").across_layers
