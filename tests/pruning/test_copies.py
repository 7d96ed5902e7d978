"""What else befalls a model while a pruner is open: copies, other pruners, code that cuts."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import taylor_kernels as tk
from taylor_kernels.pruning import Pruner
from tests.helpers import zoo
from tests.pruning.open_pruners import masked, minibatch

NAMES = ["mlp", "resnet", "mobilenet", "unet", "transformer"]


def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, loaded])
def test_a_copy_is_a_model_as_any_other(name, copied):
    # A norm that is run on some channels goes on so in copies: test_norms_across.py.
    stream = ("embed", "down.*") if name == "transformer" else ()
    model, inputs, pruner = masked(name, ignore=stream)
    twin = copied(model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    other = Pruner(twin, inputs, filters=0.8, every=1, per_step=2)
    while not other.done:
        minibatch(twin, inputs, other)
    other.compact()
    other.close()
    minibatch(model, inputs, pruner)  # and the original is none the wiser
    zoo.forward(pruner.compact().eval(), inputs)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, loaded])
def test_a_meter_is_not_copied_and_says_what_is(copied):
    model, _, pruner = masked()
    for meter in (pruner, tk.Importance(model, "taylor_fo_gate")):
        name = type(meter).__name__
        with pytest.raises(TypeError, match=rf"a tk\.{name} has hooks .* state_dict\(\)"):
            copied(meter)


@pytest.mark.parametrize("copied", [copy.deepcopy, loaded])
def test_a_model_that_holds_its_pruner_says_to_delete_it(copied):
    model, _, pruner = masked()
    model.pruner = pruner
    with pytest.raises(TypeError, match="holds it as an attribute, delete that before the model"):
        copied(model)
    del model.pruner
    copied(model)


def test_a_second_pruner_of_a_masked_model_is_told_what_to_do():
    model, inputs, pruner = masked()
    for part in (model, model[:2]):  # hooks are on its parameters too
        with pytest.raises(
            ValueError, match=r"model: an earlier Pruner holds.*compact\(\) or close"
        ):
            Pruner(part, inputs, params=0.5)
    del pruner  # what is masked stays off
    gc.collect()
    with pytest.raises(ValueError, match=r"go on with copy\.deepcopy\(model\)"):
        Pruner(model, inputs, params=0.5)
    minibatch(copied := copy.deepcopy(model), inputs, Pruner(copied, inputs, params=0.5))


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo", "magnitude_l2"])
def test_two_pruners_of_one_model(criterion):
    model, inputs, first = masked(criterion=criterion)
    first.compact()
    with pytest.raises(ValueError, match=r"model: an earlier Pruner of it is open.*close\(\)"):
        Pruner(model, inputs, criterion, filters=0.8)
    while not first.done:
        minibatch(model, inputs, first)
    first.compact()
    second = Pruner(model, inputs, criterion, filters=0.8, every=1, per_step=1)  # one after another
    minibatch(model, inputs, second)
    second.close()
    third = Pruner(model, inputs, criterion, filters=0.8)
    del third
    Pruner(model, inputs, criterion, filters=0.8)
    zoo.forward(model, inputs)


def test_masks_of_a_model_that_other_code_cut():
    model, _, pruner = masked()
    model[0] = nn.Linear(model[0].in_features, model[0].out_features + 1)
    with pytest.raises(RuntimeError, match=r"model: 0\.weight has shape .* where this pruner left"):
        pruner.compact()


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo", "magnitude_l2"])
@pytest.mark.parametrize("widen", [-1, 1])
def test_a_model_that_other_code_cut_is_pruned_no_more(criterion, widen):
    model, inputs, pruner = masked(criterion=criterion, every=3)
    places = [n for n, module in enumerate(model) if isinstance(module, nn.Linear)][:2]
    first, second = (model[place] for place in places)
    width = first.out_features + widen
    model[places[0]] = nn.Linear(first.in_features, width)
    model[places[1]] = nn.Linear(width, second.out_features)
    left = [parameter.clone() for parameter in model.parameters()]

    def until_the_pruning() -> None:
        for _ in range(3):
            minibatch(model, inputs, pruner)

    with pytest.raises(RuntimeError, match=r"model: 0\.weight has shape .* where this pruner left"):
        until_the_pruning()
    assert not pruner.history
    assert all(map(torch.equal, model.parameters(), left))


def test_nothing_is_left_of_a_pruner_whose_model_is_gone():
    gc.collect()  # those of other tests
    before = len(_global_optimizer_post_hooks)
    model, _, pruner = masked()
    assert len(_global_optimizer_post_hooks) > before
    del model, pruner
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before
    _, _, pruner = masked()
    pruner.close()
    assert len(_global_optimizer_post_hooks) == before


def inference_tensors(model, optimizer):
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return [t for t in [*model.state_dict().values(), *state] if getattr(t, "is_inference", bool)()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_inference_mode_leaves_a_model_that_can_be_trained(name, make, tmp_path):
    def start(**options):
        model, inputs = zoo.build(name)
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        optimizer = make(model.parameters(), lr=0.01, **options)
        return model, inputs, optimizer

    model, inputs, optimizer = start()
    with torch.inference_mode():
        pruner = Pruner(
            model, inputs, "taylor_fo", filters=0.5, every=1, per_step=3, optimizer=optimizer
        )

    def train():
        record = minibatch(model, inputs, pruner)
        optimizer.step()
        return record

    assert train()
    zoo.loss(model, inputs).backward()
    with torch.inference_mode():
        pruner.step()
        pruner.compact()
    assert not inference_tensors(model, optimizer)
    assert train()
    tk.save_checkpoint(tmp_path / "it", model=model, optimizer=optimizer, pruner=pruner)
    model, inputs, optimizer = start()
    pruner = Pruner(
        model, inputs, "taylor_fo", filters=0.5, every=1, per_step=3, optimizer=optimizer
    )
    with torch.inference_mode():
        tk.load_checkpoint(tmp_path / "it", model=model, optimizer=optimizer, pruner=pruner)
    assert not inference_tensors(model, optimizer)
    assert train()


def test_a_copy_of_a_scored_model_does_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    imp = tk.Importance(model, "taylor_fo_bn")
    twin = copy.deepcopy(model)
    twin(torch.randn(5, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="no forward and backward pass has been seen"):
        imp.update()
