"""Copies of a model, with values of their own, that are cut as the model was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.helpers import zoo


def pruned(name):
    """A pruner that has compacted its model, a copy from before with other values, and inputs."""
    model, inputs = zoo.build(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    pruner = tk.Pruner(model, inputs, "magnitude_l2", params=0.8, every=1, per_step=0.2)
    while not pruner.done:
        pruner.step()
    return pruner, other, inputs


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_a_copy_loses_what_the_model_lost(name):
    """What is left of it is as if its own values had been loaded before everything was cut."""
    pruner, other, inputs = pruned(name)
    pruner.compact()
    entries = pruner.removal()
    wanted = {k: v.clone() for k, v in other.state_dict().items()}
    gone = {k: cuts for k, cuts in entries.cuts.items() if k in wanted}
    for key, cuts in gone.items():
        for dim, index in cuts.items():
            left = torch.ones(wanted[key].size(dim), dtype=torch.bool)
            left[index] = False
            wanted[key] = wanted[key][(slice(None),) * dim + (left,)]
    assert tk.cut_copy(other, pruner) is other
    found = other.state_dict()
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in pruner.model.state_dict().items()
    }
    if not entries.orders:
        assert all(torch.equal(found[key], wanted[key]) for key in gone)
    zoo.forward(other, inputs)
    other.load_state_dict(pruner.model.state_dict())
    ours, theirs = zoo.forward(other.eval(), inputs), zoo.forward(pruner.model.eval(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_is_no_whole_copy_is_an_error_and_is_not_changed():
    pruner, other, _ = pruned("resnet")
    with pytest.raises(ValueError, match=r"pruner: it holds filters at zero; call compact"):
        tk.cut_copy(other, pruner)
    pruner.compact()
    for wrong, kind, words in (
        (pruner.model, ValueError, "copy: it is another model than the pruner's was at first"),
        (nn.Linear(3, 3), ValueError, "copy: it is another model"),
        (other.state_dict(), TypeError, "copy: expected a torch.nn.Module, got OrderedDict"),
    ):
        before = copy.deepcopy(wrong)
        with pytest.raises(kind, match=words):
            tk.cut_copy(wrong, pruner)
        if isinstance(wrong, nn.Module):
            after = wrong.state_dict()
            assert all(torch.equal(v, after[k]) for k, v in before.state_dict().items())
    with pytest.raises(TypeError, match=r"pruner: expected the tk.Pruner.*call cut_copy\("):
        tk.cut_copy(other, other)
    assert tk.cut_copy(other, pruner) is other
    with pytest.raises(ValueError, match="copy: it is another model"):
        tk.cut_copy(other, pruner)


def test_a_copy_that_runs_its_norms_on_a_part_is_an_error():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    pruner = tk.Pruner(model, torch.randn(2, 4), "magnitude_l2", params=0.6, every=1)
    while not pruner.done:
        pruner.step()
    other = copy.deepcopy(model)
    pruner.compact()
    with pytest.raises(ValueError, match="copy: it was made while a pruner held filters"):
        tk.cut_copy(other, pruner)


def test_a_new_pruner_cuts_a_cut_copy():
    """An average goes along through several compact()s."""
    model, inputs = zoo.build("mlp")
    other = copy.deepcopy(model)
    for _ in range(2):
        pruner = tk.Pruner(model, inputs, "magnitude_l2", filters=0.8, every=1, per_step=1)
        while not pruner.done:
            pruner.step()
        pruner.compact()
        tk.cut_copy(other, pruner)
        with pytest.raises(ValueError, match="by a new pruner alone"):
            tk.cut_copy(other, pruner)
        pruner.close()
    assert {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
