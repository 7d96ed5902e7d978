"""tk_importance: every criterion of this package ranks the channels of Torch-Pruning's groups."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch.nn.functional import cross_entropy

import taylor_kernels as tk
from taylor_kernels.integrations import torch_pruning as door
from tests.helpers.docstrings import run_examples
from tests.integrations.torch_pruning.groups import all_groups, everything, group_of


def update(importance, model, x, y) -> None:
    def loss():
        return cross_entropy(model(x), y)

    if importance._meter.needs_closure:
        importance.update(closure=loss)
        return
    model.zero_grad()
    loss().backward()
    importance.update()


@pytest.mark.parametrize("name", ["taylor_fo", "taylor_fo_gate", "taylor_so_diag", "magnitude_l1"])
def test_scores_are_those_of_the_meter(name):
    model, x, y = everything()
    importance = door.tk_importance(name, model, normalizer=None)
    meter = tk.Importance(model, name)
    if meter.needs_closure:
        meter.update(closure=lambda: cross_entropy(model(x), y))
    else:
        cross_entropy(model(x), y).backward()
        meter.update()
        importance.update()
    if meter.needs_closure:
        update(importance, model, x, y)
    scores = meter.compute()
    groups = all_groups(model, x, [model.head])
    torch.testing.assert_close(importance(group_of(groups, model.up)), scores["up"])
    both = (scores["stem"] + scores["depthwise"]) / 2
    torch.testing.assert_close(importance(group_of(groups, model.stem)), both)


def test_pruning_in_steps():
    model, x, y = everything()
    importance = door.tk_importance("taylor_fo_bn", model)
    pruner = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.head]
    )
    update(importance, model, x, y)
    pruner.step()
    with pytest.raises(RuntimeError, match="pruned since"):
        pruner.step()
    pruner.current_step = 1
    update(importance, model, x, y)
    pruner.step()
    assert model(x).shape == (5, 4)
    importance.close()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_wrong_name_says_the_nearest():
    with pytest.raises(ValueError, match="taylor_so_diag"):
        door.tk_importance("taylor_so_dia", everything()[0])


@pytest.mark.parametrize("name", door.__all__)
def test_examples_run(name):
    run_examples(getattr(door, name), name)


def test_streamed_gradients_are_of_the_parameters_before_a_pruning():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    importance = door.tk_importance("taylor_fo", model, stream=True)
    pruner = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.5, ignored_layers=[model[2]]
    )
    model.zero_grad()  # building the graph has run backward passes
    cross_entropy(model(x), y).backward()
    importance.update()
    pruner.step()
    assert model[0].out_features == 4
    cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"stream: .* make a new one by tk_importance\(\)"):
        importance.update()
