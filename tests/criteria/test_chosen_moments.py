"""Criteria that say which moments they read get these, and score as they did of all five."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from tests.helpers.cases import same_bits

CHOOSING = [name for name in tk.criterion_names() if get_criterion(name).moments]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )


def backward(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def test_the_criteria_of_moments_choose():
    assert set(CHOOSING) == {"taylor_fo", "taylor_fo_joint", "taylor_abs", "snip"}


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("stream", [False, True])
def test_scores_have_the_bits_of_all_five(name, stream):
    x, model = torch.randn(4, 3, 8, 8), net()
    backward(model, x)
    found = []
    for criterion in (name, replace(get_criterion(name), moments=None)):
        meter = tk.Importance(model, criterion, stream=stream)
        backward(model, x)
        meter.update(loss_scale=8.0)
        found.append(meter.compute())
        meter.close()
    for layer, scores in found[0].items():
        assert same_bits(scores, found[1][layer])
        assert scores.isfinite().all()


@pytest.mark.parametrize("name", CHOOSING)
def test_a_pruner_removes_the_same(name):
    x, model = torch.randn(4, 3, 8, 8), net()
    model(x)
    kept = []
    for criterion in (name, replace(get_criterion(name), moments=None)):
        one = copy.deepcopy(model)
        pruner = tk.Pruner(one, x[:1], criterion, filters=0.5, every=2, per_step=3)
        while not pruner.done:
            backward(one, x)
            pruner.step()
        kept.append([p.detach() for p in one.parameters()])
    assert all(map(same_bits, *kept))


def test_a_scaler_does_not_take_what_was_not_asked_for_an_overflow():
    model, x = net(), torch.randn(4, 3, 8, 8)
    backward(model, x)
    meter = tk.Importance(model, "taylor_fo", scaler=torch.amp.GradScaler("cpu"))
    meter._scaling._gradients = list  # no parameter's gradient tells: tables are looked at
    meter.update()
    assert meter.overflowed == 0
    model[0].weight.grad[0] = torch.inf
    model[2].weight.grad.mul_(2)
    meter.update()
    assert meter.overflowed == 1


@pytest.mark.parametrize(
    "score",
    [
        lambda table: table[:, 4],
        lambda table: table[:, 1] + table[:, 4],
        lambda table: torch.where(table[:, 4] > 1e-3, table[:, 1], 0.0),
        lambda table: table[:, [1, 4]].nansum(1),
        lambda table: torch.fmax(table[:, 1], table[:, 4]),
        lambda table: table[:, 1] * table[:, 4].nan_to_num(1.0),
    ],
)
def test_a_score_of_what_was_not_asked_for_is_an_error(score):
    """Whether or not NaN would come out of it."""
    with pytest.raises(ValueError, match="moments: 'wrong' names gw2, and its score reads g2 too"):
        tk.Criterion("wrong", "moments", score, moments=("gw2",))
    assert tk.Criterion("right", "moments", score, moments=("gw2", "g2")).moments == ("gw2", "g2")


def test_moments_are_of_their_statistic():
    with pytest.raises(ValueError, match="moments: are columns of the statistic 'moments'"):
        tk.Criterion("other", "magnitudes", lambda table: table[:, 0], moments=("w2",))
