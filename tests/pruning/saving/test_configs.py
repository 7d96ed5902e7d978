"""Pruned models of transformers: kept by their own save_pretrained where a config makes them."""

from __future__ import annotations

import copy

import pytest
import torch

import taylor_kernels as tk
from tests.zoo import judging, language

pytest.importorskip("transformers", reason="configs are those of transformers")


def to_the_minimum(model, inputs, min_filters, ignore, least=None):
    """Pruned until every layer is at its minimum, so that layers of a kind stay alike.

    least: the part of the parameters that is left then, where it is known.
    """
    options = dict(every=1, per_step=0.5, min_filters=min_filters, ignore=ignore)
    if least is None:
        message = "cannot be reached; with every layer at its minimum"
        with pytest.raises(ValueError, match=message) as e:
            tk.Pruner(model, inputs, "magnitude_l2", params=1e-3, **options)
        least = float(str(e.value).split("minimum ")[1].split(" ")[0])
    pruner = tk.Pruner(model, inputs, "magnitude_l2", params=least + 2e-4, **options)
    for _ in range(30):
        if not pruner.done:
            pruner.step()
    assert pruner.done
    pruner.compact()
    return pruner


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def noisy(model):
    """Norms and biases that are not what a fresh model has."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "minimum", "ignore", "expected"),
    [
        ("llama", 16, ["*attn*"], {"intermediate_size": (48, 16)}),
        ("llama", 8, ["*mlp*"], {"num_attention_heads": (4, 2), "num_key_value_heads": (2, 1)}),
        (
            "mixtral",
            8,
            [],
            {
                "num_attention_heads": (4, 2),
                "num_key_value_heads": (2, 1),
                "head_dim": (None, 8),
                "hidden_size": (32, 8),
                "intermediate_size": (48, 4),  # two rows a neuron, of which eight stay
            },
        ),
        ("gpt2", 48, ["*attn*"], {"n_inner": (None, 48)}),
        ("qwen3", 16, ["*attn*"], {"intermediate_size": (48, 16)}),
        ("vit", 16, ["*attention*"], {"intermediate_size": (48, 16)}),
        ("t5", 16, ["*SelfAttention*", "*EncDecAttention*"], {"d_ff": (48, 16)}),
    ],
)
def test_a_config_that_fits_makes_the_round_trip(name, minimum, ignore, expected, tmp_path):
    torch.manual_seed(0)
    model, inputs = language.BUILDERS[name]()
    config = copy.deepcopy(model.config)
    for key, (_, size) in expected.items():
        setattr(config, key, size)
    least = parameters(type(model)(config)) / parameters(model)
    to_the_minimum(noisy(model), inputs, minimum, ignore, least)
    before = judging.outputs(model, inputs)
    assert tk.update_config(model, inputs) == expected
    assert tk.update_config(model, inputs) == {}  # it fits now
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert judging.distance(before, judging.outputs(again, inputs)) < 1e-6


def test_sub_configs():
    model, inputs = language.clip()
    to_the_minimum(noisy(model), inputs, 16, ["*attn*"])
    changed = tk.update_config(model, inputs)
    assert changed == {
        "text_config.intermediate_size": (48, 16),
        "vision_config.intermediate_size": (48, 16),
    }
    assert model.vision_model.config.intermediate_size == 16


def test_the_same_shapes_are_not_the_same_model():
    torch.manual_seed(0)
    model, inputs = language.t5()  # cross-attention has lost dimensions of heads, the others heads
    to_the_minimum(noisy(model), inputs, 16, ["*DenseReluDense*"])
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=r"same shapes that does not return the same"):
        tk.update_config(model, inputs)
    assert model.config.to_dict() == config


def test_what_no_config_makes_changes_nothing_and_has_a_recipe(tmp_path):
    torch.manual_seed(0)
    model, inputs = language.bert()
    fresh = copy.deepcopy(model)
    whole = ["*intermediate*", "*output*", "*pooler*"]  # the stream, and what is within a layer
    pruner = to_the_minimum(noisy(model), inputs, 16, whole)
    before, config = judging.outputs(model, inputs), model.config.to_dict()
    with pytest.raises(ValueError, match=r"no BertConfig makes.*query.weight, .*tk.save_pruned"):
        tk.update_config(model, inputs)  # a head's width is that of the stream over the heads
    assert model.config.to_dict() == config
    tk.save_pruned(tmp_path / "it", pruner)
    again = tk.load_pruned(fresh, tmp_path / "it").eval()
    assert judging.distance(before, judging.outputs(again, inputs)) < 1e-6


def test_other_models_have_no_config():
    with pytest.raises(TypeError, match=r"model: expected a model of transformers.*Linear"):
        tk.update_config(torch.nn.Linear(2, 2), torch.randn(1, 2))


class Scaled(torch.nn.Module):
    """A buffer of its channels is not saved, but made anew of their number."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.enter = torch.nn.Linear(4, config.width)
        self.leave = torch.nn.Linear(config.width, 2)
        self.register_buffer("scale", torch.linspace(1, 2, config.width), persistent=False)

    def forward(self, x):
        return self.leave(self.enter(x) * self.scale)


class Config:
    def __init__(self):
        self.width = 8

    def to_dict(self):
        return dict(vars(self))


def test_a_buffer_that_is_not_saved_would_have_other_values():
    model, x = Scaled(Config()), torch.randn(1, 4)
    to_the_minimum(model, x, 4, [])
    assert model.enter.out_features == 4
    with pytest.raises(ValueError, match=r"model: the buffer scale .*tk.save_pruned"):
        tk.update_config(model, x)
    assert model.config.width == 8
