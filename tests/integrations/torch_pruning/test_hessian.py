"""GroupHessianImportance: equal to a loop over examples, in one pass; Torch-Pruning's in strict."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.functional import cross_entropy

from taylor_kernels.integrations.torch_pruning import GroupHessianImportance, HessianImportance
from tests.integrations.torch_pruning.groups import (
    all_groups,
    assert_same,
    everything,
    expected,
    group_of,
    loop_squares,
)

KINDS = (nn.modules.conv._ConvNd, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)


def documented_loop(importance, model, losses) -> None:
    importance.zero_grad()
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)


@pytest.fixture
def problem():
    model, x, y = everything()
    groups = all_groups(model, x, [model.head])
    terms = loop_squares(model, lambda n: cross_entropy(model(x[n]), y[n]), len(x))
    return model, x, y, groups, [expected(group, terms, KINDS) for group in groups]


def check(importance, groups, want) -> None:
    for group, scores in zip(groups, want, strict=True):
        assert_same(importance(group), scores)


def test_one_pass_is_the_loop_over_examples(problem):
    model, x, y, groups, want = problem
    importance = GroupHessianImportance()
    importance.accumulate(model, lambda: cross_entropy(model(x[:2]), y[:2]))
    importance.accumulate(
        model, lambda: cross_entropy(model(x[2:]), y[2:], reduction="sum"), reduction="sum"
    )
    check(importance, groups, want)
    assert importance._sweep.launches == 1
    assert all(p.grad is None for p in model.parameters())


def test_the_documented_loop_counts_every_example(problem):
    """Torch-Pruning's keeps the last alone."""
    model, x, y, groups, want = problem
    importance, theirs = HessianImportance(), tp.importance.HessianImportance()
    for each in (importance, theirs):
        documented_loop(each, model, cross_entropy(model(x), y, reduction="none"))
    last = {p: p.grad.square() for p in model.parameters()}
    assert all(torch.equal(square, last[p]) for p, square in theirs._accu_grad.items())
    check(importance, groups, want)
    assert all(torch.equal(p.grad.square(), last[p]) for p in model.parameters())


def test_strict_is_torch_pruning(problem):
    model, x, y, groups, _ = problem
    ours = GroupHessianImportance(strict_compat=True)
    theirs = tp.importance.GroupHessianImportance()
    found = []
    for each in (ours, theirs):
        documented_loop(each, model, cross_entropy(model(x), y, reduction="none"))
        found.append([each(g) for g in groups if g is not group_of(groups, model.up)])
    for mine, want in zip(*found, strict=True):
        assert_same(mine, want)


def test_biases_of_norms_are_no_error(problem):
    """Torch-Pruning tests whether they have a gradient the wrong way round."""
    model, x, y, groups, _ = problem
    group = group_of(groups, model.stem)
    theirs = tp.importance.GroupHessianImportance(bias=True)
    documented_loop(theirs, model, cross_entropy(model(x), y, reduction="none"))
    theirs(group)
    model.norm.bias.grad = None
    for broken in (theirs, GroupHessianImportance(bias=True, strict_compat=True)):
        with pytest.raises(AttributeError):
            broken(group)
    model.norm.bias.requires_grad_(False)
    importance = GroupHessianImportance()
    importance.accumulate(model, lambda: cross_entropy(model(x), y))
    assert importance(group).isfinite().all()


def test_gathering_starts_anew_after_scoring(problem):
    model, x, y, groups, want = problem
    importance = GroupHessianImportance()
    importance.accumulate(model, lambda: cross_entropy(model(x.flip(0)), y))
    importance(groups[0])
    importance.accumulate(model, lambda: cross_entropy(model(x), y))
    check(importance, groups, want)


def test_a_step_of_pruning_takes_new_gradients(problem):
    model, x, y, _, _ = problem
    importance = GroupHessianImportance()
    pruner = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.head]
    )
    with pytest.raises(RuntimeError, match="nothing was gathered"):
        pruner.step()
    pruner.current_step = 0
    importance.accumulate(model, lambda: cross_entropy(model(x), y))
    pruner.step()
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        pruner.step()
    pruner.current_step = 1
    importance.accumulate(model, lambda: cross_entropy(model(x), y))
    pruner.step()
    assert model(x).shape == (5, 4)


def test_strict_has_no_verb_of_ours(problem):
    model, x, _, _, _ = problem
    with pytest.raises(RuntimeError, match="accumulate_grad"):
        GroupHessianImportance(strict_compat=True).accumulate(model, lambda: model(x).sum())
