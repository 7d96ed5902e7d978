"""Models packed in bits: what is restored is the rounded model, and files that are not whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taylor_kernels.methods import MirrorDescent, load_packed
from taylor_kernels.methods.packed import pack, unpack

safetensors_torch = pytest.importorskip("safetensors.torch", reason="packed files need safetensors")


class Tied(nn.Module):
    """A decoder that is its encoder's weight, buffers, and a float layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.norm = nn.BatchNorm1d(7)
        self.mix = nn.Conv1d(7, 7, 3, padding=1)
        self.out = nn.Linear(7, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.mix(self.norm(self.embed(tokens).mT)).mT)


@given(st.lists(st.integers(0, 3), max_size=70), st.sampled_from([1, 2]))
@settings(max_examples=60)
def test_codes_come_back(codes, bits):
    given_codes = torch.tensor(codes, dtype=torch.uint8) % 2**bits
    packed = pack(given_codes, bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert unpack(packed, len(codes), bits).equal(given_codes)


def trained(levels: str, dtype: torch.dtype, scale) -> tuple[Tied, MirrorDescent, torch.Tensor]:
    torch.manual_seed(0)
    model = Tied()
    tokens = torch.randint(11, (4, 9))
    optimizer = MirrorDescent(model.to(dtype).parameters(), lr=0.1, levels=levels, scale=scale)
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens).float().square().mean().backward()
        optimizer.step()
    return model.eval(), optimizer, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("levels", ["binary", "ternary"])
@pytest.mark.parametrize("scale", [None, "layer", 0.3])
def test_the_loaded_model_has_the_outputs_of_the_rounded_one(levels, dtype, scale, tmp_path):
    model, optimizer, tokens = trained(levels, dtype, scale)
    soft = copy.deepcopy(model.state_dict())
    path = tmp_path / "it.safetensors"
    size = optimizer.export(model, path)
    assert size == path.stat().st_size
    for name, value in model.state_dict().items():
        assert value.equal(soft[name]), name
    optimizer.quantize()
    expected = model(tokens)
    plain = Tied().to(dtype).eval()
    assert load_packed(plain, path) is plain
    assert plain.out.weight is plain.embed.weight
    assert plain(tokens).equal(expected)
    for name, value in plain.state_dict().items():
        assert value.equal(model.state_dict()[name]), name
    bits = {"binary": 1, "ternary": 2}[levels]
    stored = safetensors_torch.load_file(path)
    assert stored["embed.weight.packed"].numel() == -(-77 * bits // 8)
    assert stored["mix.weight.packed"].numel() == -(-147 * bits // 8)


def test_a_file_that_does_not_fit_leaves_the_model(tmp_path):
    model, optimizer, _ = trained("ternary", torch.float32, "layer")
    path = tmp_path / "it.safetensors"
    optimizer.export(model, path)

    def refused(message, other=None, change=lambda tensors, about: None):
        tensors = safetensors_torch.load_file(path)
        with safetensors_torch.safe_open(path, framework="pt") as file:
            about = file.metadata()
        layout = json.loads(about["layout"])
        change(tensors, layout)
        bad = tmp_path / "bad.safetensors"
        safetensors_torch.save_file(tensors, bad, about | {"layout": json.dumps(layout)})
        other = other or Tied()
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            load_packed(other, bad)
        assert all(value.equal(before[name]) for name, value in other.state_dict().items())

    refused("model: the file lacks", nn.Linear(7, 11))
    wide = Tied()
    wide.norm.register_buffer("running_var", torch.ones(8))
    refused("'norm.running_var' has shape", wide)
    refused("has codes of no level", change=lambda t, _: t["mix.weight.packed"].fill_(255))
    refused(
        "bytes of weights",
        change=lambda t, _: t.update({"mix.weight.packed": t["mix.weight.packed"][1:].clone()}),
    )
    refused("is not complete", change=lambda t, _: t.pop("mix.weight.scale"))
    refused("is not complete", change=lambda _, a: a["quantized"]["mix.weight"].update(bits=3))
    refused("is another name of", change=lambda _, a: a["other_names"].update({"out.weight": "x"}))

    for layout in ({}, {"layout": "{"}, {"layout": "[]"}, {"layout": '{"quantized": {}}'}):
        about = {"format": "taylor_kernels.packed.1", **layout}
        safetensors_torch.save_file({"weight": torch.ones(2)}, path, about)
        with pytest.raises(ValueError, match="has no layout of its tensors"):
            load_packed(Tied(), path)
    safetensors_torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="was not written by export"):
        load_packed(Tied(), path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_packed(Tied(), path)
    with pytest.raises(ValueError, match="there is no file"):
        load_packed(Tied(), tmp_path / "none")


def test_a_model_of_other_parameters_is_refused(tmp_path):
    model, optimizer, _ = trained("binary", torch.float32, None)
    with pytest.raises(ValueError, match="2 of the 2 quantized parameters are none of its own"):
        optimizer.export(copy.deepcopy(model), tmp_path / "it.safetensors")
    assert not list(tmp_path.iterdir())
