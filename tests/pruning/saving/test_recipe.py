"""A pruned model is saved with what cuts a fresh one to its shape; other files change nothing."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.pruning import Pruner, load_pruned, save_pruned
from tests.helpers import zoo

pytest.importorskip("safetensors", reason="pruned models are files of safetensors")

from safetensors import safe_open
from safetensors.torch import save_file

NAMES = ("vgg", "resnext", "densenet", "mobilenet", "unet_grouped", "transformer", "gated", "odd")


def pruned(name: str, *, stops: int = 2, **options):
    """A model of the zoo, pruned and compacted in several goes; its inputs and its pruner."""
    model, inputs = zoo.build(name)
    pruner = Pruner(model, inputs, "magnitude_l2", every=1, **({"params": 0.5} | options))
    for number in range(100):
        if pruner.done:
            break
        pruner.step()
        if number % stops == 1:
            pruner.compact()
    pruner.compact()
    return model.eval(), inputs, pruner


def values(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_model_becomes_the_pruned_one(name, tmp_path):
    model, inputs, pruner = pruned(name)
    save_pruned(tmp_path / "it", pruner)
    fresh, _ = zoo.build(name, seed=7)
    again = load_pruned(fresh, tmp_path / "it").eval()
    assert again is fresh
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in again.named_parameters()}
    assert repr(again) == repr(model)  # the attributes that count channels too
    x = zoo.fresh(inputs)
    assert torch.equal(zoo.forward(again, x), zoo.forward(model, x))
    zoo.loss(again.train(), x).backward()  # and it trains
    assert all(p.grad is not None and p.grad.shape == p.shape for p in again.parameters())


def tied() -> nn.Module:
    """Two layers of one weight, between others that can go."""
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), one, nn.ReLU(), other, nn.Linear(6, 2))


def test_the_same_indices_along_dimensions_of_several_sizes(tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2)
        )

    model = make()
    with torch.no_grad():  # the first units of both layers are the least
        for layer, unit in ((model[0], 0), (model[0], 1), (model[2], 0), (model[2], 1)):
            layer.weight[unit] *= 1e-3
    pruner = Pruner(model, torch.randn(2, 3), "magnitude_l2", filters=0.72, every=1, per_step=4)
    while not pruner.done:
        pruner.step()
    pruner.compact()
    assert model[2].weight.shape == (3, 7)
    save_pruned(tmp_path / "it", pruner)
    again = load_pruned(make(), tmp_path / "it")
    inputs = torch.randn(4, 3)
    assert torch.equal(again(inputs), model(inputs))


def test_a_tensor_of_two_names_is_one_before_and_after(tmp_path):
    x = torch.randn(5, 4)
    pruner = Pruner(tied(), x[:1], "magnitude_l2", filters=0.6, every=1)
    while not pruner.done:
        pruner.step()
    model = pruner.compact()
    save_pruned(tmp_path / "it", pruner)
    with safe_open(tmp_path / "it", "pt") as file:
        assert ("2.weight" in file.keys()) != ("4.weight" in file.keys())  # noqa: SIM118
    again = load_pruned(tied(), tmp_path / "it")
    assert again[2].weight is again[4].weight
    assert torch.equal(again(x), model(x))


def test_a_model_that_lost_nothing_is_saved_too(tmp_path):
    model, inputs, pruner = pruned("mlp", params=1.0)
    save_pruned(tmp_path / "it", pruner)
    again = load_pruned(zoo.build("mlp", seed=3)[0], tmp_path / "it").eval()
    assert torch.equal(zoo.forward(again, inputs), zoo.forward(model, inputs))


def test_masked_filters_are_to_be_removed_first(tmp_path):
    model, inputs = zoo.build("mlp")
    pruner = Pruner(model, inputs, "magnitude_l2", filters=0.5, every=1)
    pruner.step()
    with pytest.raises(ValueError, match=r"^pruner: .*compact\(\) first"):
        save_pruned(tmp_path / "it", pruner)
    assert list(tmp_path.iterdir()) == []


def test_arguments_in_another_order_are_named(tmp_path):
    model, _, pruner = pruned("mlp")
    with pytest.raises(TypeError, match=r"^pruner: expected the tk.Pruner of the model, got Seq"):
        save_pruned(tmp_path / "it", model)
    with pytest.raises(TypeError, match=r"^path: expected a path, got Pruner"):
        save_pruned(pruner, tmp_path / "it")
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module"):
        load_pruned(tmp_path / "it", model)
    with pytest.raises(TypeError, match=r"^path: expected a path, got Pruner"):
        load_pruned(model, pruner)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["wider", "resnet", "no attribute"])
def test_another_model_is_refused_and_left_alone(other, tmp_path):
    _, _, pruner = pruned("vgg")
    save_pruned(tmp_path / "it", pruner)
    model, _ = zoo.build("resnet" if other == "resnet" else "vgg")
    if other == "wider":
        model.features[4] = nn.Conv2d(8, 13, 3, padding=1)
    if other == "no attribute":
        del model.features[0].out_channels
    before, modules = values(model), repr(list(model.named_parameters()))
    with pytest.raises(ValueError, match=r"^model: .* was pruned from another model; \d+ entries"):
        load_pruned(model, tmp_path / "it")
    assert all(map(torch.equal, values(model), before))
    assert repr(list(model.named_parameters())) == modules


def test_bad_files_say_what_they_are(tmp_path):
    _, _, pruner = pruned("mlp")
    path = tmp_path / "it"
    save_pruned(path, pruner)
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recipe = json.loads(metadata["taylor_kernels.pruned"])
    first = next(name for name, own in recipe["attributes"].items() if "out_features" in own)

    def refused(match: str) -> None:
        model, _ = zoo.build("mlp")
        before = values(model)
        with pytest.raises(ValueError, match=match):
            load_pruned(model, path)
        assert all(map(torch.equal, values(model), before))

    for content in (b"", b"what", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused("is damaged or no safetensors file")
    save_file(tensors, path)
    refused("was not written by save_pruned")
    for changed, says in (
        (recipe | {"version": "9"}, "has version 9 of the format"),
        ({k: v for k, v in recipe.items() if k != "cuts"}, "is damaged"),
        (recipe | {"indices": []}, "is damaged"),
        (recipe | {"indices": [[99]] * 9}, "an index is 99"),
        (recipe | {"indices": [[10**13]] * 9}, "an index is 10000000000000"),
        (recipe | {"indices": [[10**30]] * 9}, "is damaged"),
        (recipe | {"indices": [[-1]] * 9}, "an index is -1"),
        (recipe | {"indices": [[[1]]] * 9}, "no list of integers"),
        (recipe | {"indices": [[1, 1]] * 9}, "there twice"),
        (recipe | {"cuts": {n: {"7": 0} for n in recipe["cuts"]}}, "has no dimension 7"),
        (recipe | {"attributes": [1]}, "is damaged"),
        *(
            (recipe | {"attributes": {first: {name: value}}}, f"would set {first}.{name} to")
            for name, value in (
                ("__class__", 3),
                ("forward", 3),
                ("bias", 3),
                ("training", 1),
                ("_modules", {}),
                ("out_features", [3]),
                ("out_features", True),
                ("out_features", "3"),
            )
        ),
        (recipe | {"shapes": {n: [99, 99] for n in recipe["shapes"]}}, "another model"),
    ):
        save_file(tensors, path, {"taylor_kernels.pruned": json.dumps(changed)})
        refused(says)
    save_file(tensors, path, {"taylor_kernels.pruned": "{"})
    refused("is damaged")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_pruned(zoo.build("mlp")[0], tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module"):
        load_pruned(3, path)


def test_what_is_no_tensor_and_a_missing_library_are_named(tmp_path, monkeypatch):
    model, _, pruner = pruned("mlp")

    class Noting(type(model[1])):
        def get_extra_state(self):
            return "notes"

    model[1].__class__ = Noting
    with pytest.raises(ValueError, match=r"'1\._extra_state' of its state_dict is a str"):
        save_pruned(tmp_path / "it", pruner)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'taylor-kernels\[demo\]'"):
        tk.save_pruned(tmp_path / "it", pruner)
