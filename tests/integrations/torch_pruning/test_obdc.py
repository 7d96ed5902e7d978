"""OBDCImportance: equal to a loop over examples for every kind of layer; strict is the peer's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.functional import cross_entropy
from torch_pruning.pruner.importance import OBDCImportance as OwnOBDC

from taylor_kernels.integrations.torch_pruning import OBDCImportance
from tests.integrations.torch_pruning.groups import (
    all_groups,
    assert_same,
    everything,
    expected,
    loop_squares,
)

KINDS = (nn.modules.conv._ConvNd, nn.Linear)


def pruner_of(model, x, importance, **more):
    return tp.pruner.BasePruner(
        model,
        x[:1],
        importance,
        pruning_ratio=0.5,
        ignored_layers=[list(model.modules())[-1]],
        **more,
    )


class Theirs(OwnOBDC):
    """With the one mend without which its hooks are put on attention alone."""

    def _prepare_model(self, model, pruner) -> None:
        for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
            for dep, _ in group:
                layer = dep.target.module
                if isinstance(layer, KINDS) and "out_" in dep.handler.__name__:
                    self.modules.append(layer)
                    layer.register_forward_pre_hook(self._save_input)
                    layer.register_backward_hook(self._save_grad_output)


def gather(importance, model, x, y, pruner, steps=1) -> None:
    importance._prepare_model(model, pruner)
    for part in torch.arange(len(x)).chunk(steps):
        model.zero_grad()
        cross_entropy(model(x[part]), y[part]).backward()
        importance.step()
    importance._rm_hooks(model)


def scores_of(importance, model, x, y) -> list[Any]:
    gather(importance, model, x, y, pruner_of(model, x, importance))
    return [importance(group) for group in all_groups(model, x[:1], [model[-1]])]


def plain() -> nn.Sequential:
    """What Torch-Pruning's own can take: no bias, no groups, no dilation."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.Tanh(),
        nn.Conv2d(6, 5, (3, 2), bias=False), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(5 * 9, 9, bias=False), nn.Tanh(), nn.Linear(9, 4, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2])
def test_every_kind_of_layer_is_the_loop_over_examples(steps):
    model, x, y = everything()
    importance = OBDCImportance(num_classes=None)
    importance.eps = 0
    gather(importance, model, x, y, pruner_of(model, x, importance), steps)
    terms = loop_squares(model, lambda n: cross_entropy(model(x[n]), y[n]), len(x))
    for group in all_groups(model, x[:1], [model.head]):
        want = expected(group, terms, KINDS, outputs_only=True)
        assert_same(importance(group), want)


def test_a_closure_takes_the_place_of_the_passes():
    """The same matrices without a gradient of a weight; strict_compat has no such thing."""
    model, x, y = everything()
    by_loop, by_closure = (OBDCImportance(num_classes=None) for _ in range(2))
    gather(by_loop, model, x, y, pruner_of(model, x, by_loop), steps=2)
    model.zero_grad()
    by_closure._prepare_model(model, pruner_of(model, x, by_closure))
    for part in torch.arange(len(x)).chunk(2):
        by_closure.step(lambda part=part: cross_entropy(model(x[part]), y[part]))
    by_closure._rm_hooks(model)
    assert by_closure.steps == by_loop.steps == 2
    assert by_closure.Fisher.keys() == by_loop.Fisher.keys()
    for layer, fisher in by_loop.Fisher.items():
        torch.testing.assert_close(by_closure.Fisher[layer], fisher)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="takes no closure"):
        OBDCImportance(strict_compat=True).step(lambda: model(x).sum())


def test_layers_that_share_a_weight():
    """Its gradients add up over both uses before they are squared, and both layers have the sum."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Flatten(),
        nn.Linear(36, 3),
    ).double()  # fmt: skip
    model[3].weight = model[1].weight
    x, y = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randint(0, 3, (5,))
    importance = OBDCImportance(num_classes=None)
    gather(importance, model, x, y, pruner_of(model, x, importance))
    want = torch.zeros_like(model[1].weight)
    for n in range(5):
        loss = cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        want += torch.autograd.grad(loss, model[1].weight)[0].square()
    for layer in (model[1], model[3]):
        torch.testing.assert_close(importance.Fisher[layer], want)


def test_strict_is_torch_pruning():
    model, x, y = plain(), torch.randn(6, 3, 9, 8), torch.randint(0, 4, (6,))
    ours = OBDCImportance(num_classes=4, strict_compat=True)
    theirs = Theirs(num_classes=4)
    for each in (ours, theirs):
        gather(each, model, x, y, pruner_of(model, x, each), steps=2)
    assert ours.Fisher.keys() == theirs.Fisher.keys()
    for layer, fisher in theirs.Fisher.items():
        assert_same(ours.Fisher[layer], fisher)
    for group in all_groups(model, x[:1], [model[-1]]):
        assert_same(ours(group), theirs(group))


@pytest.mark.parametrize("change", [dict(dilation=2), dict(groups=3), dict(bias=True)])
def test_dilation_groups_and_biases_raise_there(change):
    model = plain()
    options = dict(kernel_size=(2, 2), bias=False, padding=1) | change
    model[2] = nn.Conv2d(6, 6, **options)
    x = torch.randn(6, 3, 9, 8)
    model[5] = nn.Linear(model[:5](x).size(1), 9, bias=False)
    y = torch.randint(0, 4, (6,))
    with pytest.raises(RuntimeError):
        scores_of(Theirs(num_classes=4), copy.deepcopy(model), x, y)
    ours = OBDCImportance()
    gather(ours, model, x, y, pruner_of(model, x, ours))
    terms = loop_squares(model, lambda n: cross_entropy(model(x[n]), y[n]), len(x))
    for group in all_groups(model, x[:1], [model[-1]]):
        want = expected(group, terms, KINDS, outputs_only=True)
        assert_same(ours(group), want)


def test_its_own_prepare_model_takes_attention_alone():
    model, x = plain(), torch.randn(1, 3, 9, 8)
    theirs = OwnOBDC()
    with pytest.raises(TypeError):
        theirs._prepare_model(model, pruner_of(model, x, theirs))


def test_hooks_of_others_stay():
    """Torch-Pruning's takes every hook off the layers."""
    x, y = torch.randn(6, 3, 9, 8), torch.randint(0, 4, (6,))
    for make, calls_left in ((Theirs, 0), (OBDCImportance, 1)):
        model, calls = plain(), []
        model[2].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        importance = make()
        gather(importance, model, x, y, pruner_of(model, x, importance))
        calls.clear()
        model(x)
        assert len(calls) == calls_left
        assert len(model[2]._forward_hooks) == 0


def test_pruning_in_steps_cuts_what_is_known():
    model, x, y = plain(), torch.randn(6, 3, 9, 8), torch.randint(0, 4, (6,))
    importance = OBDCImportance()
    pruner = pruner_of(model, x, importance, iterative_steps=2)
    gather(importance, model, x, y, pruner)
    for _ in range(2):
        pruner.step()
        assert all(importance.Fisher[m].shape == m.weight.shape for m in importance.modules)
    assert model(x).shape == (6, 4)


def test_scores_need_a_step():
    model, x, _ = everything()
    importance = OBDCImportance()
    with pytest.raises(RuntimeError, match="_prepare_model"):
        importance.step()
    with pytest.raises(RuntimeError, match="no step"):
        importance(all_groups(model, x[:1], [model.head])[0])
