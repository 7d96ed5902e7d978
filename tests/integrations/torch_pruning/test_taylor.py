"""GroupTaylorImportance: right by default against float64, Torch-Pruning's own in strict mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch_pruning as tp
from torch import nn

from taylor_kernels.integrations.torch_pruning import GroupTaylorImportance, TaylorImportance
from tests.integrations.torch_pruning.groups import (
    all_groups,
    assert_same,
    everything,
    expected,
    group_of,
)

KINDS = (nn.modules.conv._ConvNd, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)


@pytest.fixture
def scored():
    """Gradients in place, and all groups but that of what the network predicts."""
    model, x, y = everything()
    nn.functional.cross_entropy(model(x), y).backward()
    return model, all_groups(model, x, [model.head])


def abs_gw(parameter: nn.Parameter) -> torch.Tensor:
    return (parameter.detach().double() * parameter.grad.double()).abs()


def test_every_parameter_of_a_channel_counts(scored):
    _, groups = scored
    importance = GroupTaylorImportance()
    for group in groups:
        want = expected(group, abs_gw, KINDS)
        assert_same(importance(group), want)
    assert importance._sweep.launches == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "prod", "first", "gate"])
@pytest.mark.parametrize("normalizer", ["mean", "sum", "standarization", None])
@pytest.mark.parametrize("multivariable", [False, True])
def test_strict_is_torch_pruning(scored, reduction, normalizer, multivariable):
    model, groups = scored
    groups = [g for g in groups if not any(model.up is dep.target.module for dep, _ in g)]
    settings = reduction, normalizer, multivariable
    ours = GroupTaylorImportance(*settings, strict_compat=True)
    theirs = tp.importance.GroupTaylorImportance(*settings)
    for group in groups:
        assert_same(ours(group), theirs(group))


def test_strict_counts_biases_as_torch_pruning_does(scored):
    _, groups = scored
    ours = GroupTaylorImportance(bias=True, strict_compat=True)
    theirs = tp.importance.GroupTaylorImportance(bias=True)
    for group in groups:
        assert_same(ours(group), theirs(group))


@pytest.mark.parametrize("layer", ["norm", "depthwise"])
def test_batch_norm_and_depthwise_layers_count(scored, layer):
    """Their gradients times a million change everything, and nothing in Torch-Pruning."""
    model, groups = scored
    group = group_of(groups, model.stem)
    theirs, ours = tp.importance.GroupTaylorImportance(), GroupTaylorImportance()
    before = theirs(group), ours(group)
    for parameter in getattr(model, layer).parameters():
        parameter.grad *= 1e6
    assert torch.equal(theirs(group), before[0])
    want = expected(group, abs_gw, KINDS)
    assert (ours(group) - before[1]).abs().max() > 0.01
    assert_same(ours(group), want)


def test_input_channels_of_grouped_layers_have_their_own_weights(scored):
    """Torch-Pruning gives channels 0 and 4 of 12 in three groups one score."""
    model, groups = scored
    group = group_of(groups, model.point)
    only = [nn.modules.conv._ConvNd]
    model.point.weight.grad.zero_()
    model.point.bias.grad.zero_()
    theirs = tp.importance.GroupTaylorImportance(target_types=only)(group).view(3, 4)
    torch.testing.assert_close(theirs[0], theirs[1])
    ours = GroupTaylorImportance(target_types=only)(group)
    want = expected(group, abs_gw, tuple(only))
    assert_same(ours, want)


def test_frozen_layers_are_left_out(scored):
    model, groups = scored
    group = group_of(groups, model.stem)
    model.point.weight.grad = None
    with pytest.raises(AttributeError):
        tp.importance.GroupTaylorImportance()(group)
    with pytest.raises(AttributeError):
        GroupTaylorImportance(strict_compat=True)(group)
    with pytest.warns(UserWarning, match=r"point.*without a gradient"):
        found = GroupTaylorImportance()(group)
    model.point.weight.grad = torch.zeros_like(model.point.weight)
    torch.testing.assert_close(found, GroupTaylorImportance()(group))


def test_no_gradient_at_all_is_an_error(scored):
    model, groups = scored
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        GroupTaylorImportance()(groups[0])


def test_a_shared_weight_counts_once():
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    second.weight = first.weight

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = first, second, nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)) + self.second(x.square()))

    model, x = Shared(), torch.randn(3, 4)
    model(x).square().sum().backward()
    (group,) = (g for g in all_groups(model, x, [model.head]) if len(g[0].idxs) == 6)
    sums = abs_gw(first.weight).sum(1) + abs_gw(model.head.weight).sum(0)
    found = GroupTaylorImportance("sum", None)(group)
    assert_same(found, sums)


def test_some_channels_have_the_scores_that_they_have_among_all(scored):
    model, _ = scored
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 4, 4))
    whole, some = (
        graph.get_pruning_group(model.down, tp.prune_conv_out_channels, idxs)
        for idxs in (list(range(5)), [1, 4])
    )
    importance = GroupTaylorImportance(normalizer=None)
    torch.testing.assert_close(importance(some), importance(whole)[[1, 4]])


def test_tables_are_those_of_the_gradients_that_are_there(scored):
    """After whatever changes a parameter or its gradient, as if they had been read afresh."""
    model, groups = scored
    importance = GroupTaylorImportance()
    group = group_of(groups, model.stem)
    kept = importance(group)
    changes = [
        lambda p: p.grad.mul_(torch.rand_like(p)),
        lambda p: setattr(p, "grad", torch.randn_like(p)),
        lambda p: nn.init.normal_(p),
        lambda p: setattr(p.grad, "data", torch.randn_like(p)),
        lambda p: setattr(p, "data", torch.randn_like(p)),
    ]
    for change in changes:
        change(model.stem.weight)
        found = importance(group)
        assert torch.equal(found, GroupTaylorImportance()(group))
        assert not torch.equal(found, kept)
        assert torch.equal(importance(group), found)
        kept = found
    assert importance._sweep.launches == 1 + len(changes)


@pytest.mark.parametrize("strict", [False, True])
def test_pruning_in_steps(strict):
    """Pruning replaces parameters; the next step scores what is there then."""
    model, x, y = everything()
    importance = TaylorImportance(strict_compat=strict)
    pruner = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.6, iterative_steps=3, ignored_layers=[model.head]
    )
    for _ in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.step()
    assert model.stem.out_channels < 8
    assert model(x).shape == (5, 4)


def test_it_is_one_of_torch_prunings():
    assert isinstance(TaylorImportance(), tp.importance.TaylorImportance)
    assert isinstance(GroupTaylorImportance(), tp.importance.GroupTaylorImportance)
    assert GroupTaylorImportance().bias
    assert not GroupTaylorImportance(strict_compat=True).bias


def test_it_can_be_copied_and_saved(scored):
    _, groups = scored
    importance = GroupTaylorImportance()
    want = importance(groups[0])
    for other in (copy.deepcopy(importance), pickle.loads(pickle.dumps(importance))):
        assert torch.equal(other(groups[0]), want)


def test_half_gradients_are_summed_in_float32():
    """Products of 1e-5 and 1e-5 are 0 in float16."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)).half()
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, 1e-4)
        parameter.grad = torch.rand_like(parameter) * 1e-4
    (group,) = all_groups(model.float(), torch.randn(1, 16), [model[1]])
    for parameter in model.half().parameters():
        parameter.grad = parameter.grad.half()
    found = GroupTaylorImportance()(group)
    want = expected(group, abs_gw, (nn.Linear,))
    assert_same(found, want)
