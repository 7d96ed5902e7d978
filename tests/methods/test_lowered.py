"""Layers without their columns of zeros, and networks without channels that nobody reads."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taylor_kernels as tk


def random_convolution(draw: st.DataObject) -> nn.Module:
    dims = draw.draw(st.integers(1, 2))

    def some(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.draw(st.integers(low, high)) for _ in range(dims))

    same = draw.draw(st.booleans())
    return (nn.Conv1d, nn.Conv2d)[dims - 1](
        draw.draw(st.integers(1, 5)),
        draw.draw(st.integers(1, 4)),
        some(1, 4),
        stride=1 if same else some(1, 3),
        padding="same" if same else some(0, 2),
        dilation=some(1, 2),
        bias=draw.draw(st.booleans()),
        padding_mode=draw.draw(st.sampled_from(["zeros", "replicate", "circular"])),
    ).double()


@given(st.data(), st.integers(0, 2**31))
@settings(max_examples=60)
def test_a_lowered_convolution_is_the_pruned_one(data, seed):
    torch.manual_seed(seed)
    layer = random_convolution(data)
    kept = torch.rand(layer.weight.shape[1:]) < 0.6
    kept.view(-1)[0], kept.view(-1)[-1] = True, kept.numel() == 1
    with torch.no_grad():
        layer.weight.mul_(kept)
    model = nn.Sequential(layer)
    twin = copy.deepcopy(model)
    batch = (2,) if data.draw(st.booleans()) else ()
    shape = (*batch, layer.in_channels, *[9] * (layer.weight.dim() - 2))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    if kept.all():
        assert tk.methods.lower_columns(model) == {}
        return
    assert tk.methods.lower_columns(model) == {"0": pytest.approx(kept.double().mean().item())}
    found, expected = model(x), twin(x2)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert found.shape == expected.shape
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(x.grad, x2.grad, rtol=1e-10, atol=1e-12)


def test_linear_layers_shared_layers_and_export():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 3, 1))
    with torch.no_grad():
        shared.weight[:, 1::2] = 0
        model[4].weight[:, 0] = 0
    x = torch.randn(3, 6)
    expected = model(x)
    assert tk.methods.lower_columns(model) == {"0": 0.5, "2": 0.5, "4": pytest.approx(5 / 6)}
    assert model[0] is model[2]
    assert torch.allclose(model(x), expected, atol=1e-6)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), expected, atol=1e-6)


def test_what_cannot_be_lowered_says_why():
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    dense = nn.Linear(4, 4)
    empty = nn.Linear(4, 4)
    nn.init.zeros_(empty.weight)
    model = nn.Sequential(grouped, dense, empty, nn.ReLU())
    for name, said in [("0", "2 groups"), ("1", "none is zero"), ("2", "all"), ("3", "ReLU")]:
        with pytest.raises(ValueError, match=said):
            tk.methods.lower_columns(model, [name])
    with pytest.raises(ValueError, match="no module '8'"):
        tk.methods.lower_columns(model, ["8"])
    assert tk.methods.lower_columns(model) == {}
    assert model[1] is dense


class TwoReaders(nn.Module):
    """A stream that two layers read; with `product`, its channels meet each other as well."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.product = product

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.left(x) + self.right(x)
        return y + (x * x).sum(1, keepdim=True) if self.product else y


def test_channels_go_that_no_layer_reads():
    torch.manual_seed(0)
    model, x = TwoReaders(product=False).eval(), torch.randn(2, 3, 6, 6)
    nn.init.normal_(model.norm.bias)
    with torch.no_grad():
        model.left.weight[:, [1, 3, 4]] = 0
        model.right.weight[:, [3, 4, 6]] = 0
    expected = model(x)
    assert tk.methods.remove_unread(model, x) == 2
    assert (model.stem.out_channels, model.norm.num_features, model.right.in_channels) == (6, 6, 6)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_channels_stay_that_something_else_reads():
    torch.manual_seed(0)
    model = nn.Sequential(TwoReaders(product=True), TwoReaders(product=False)).eval()
    model[1].stem = nn.Conv2d(4, 8, 3)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for part in model:
            part.left.weight[:, 3] = 0
            part.right.weight[:, 3] = 0
    expected = model(x)
    assert tk.methods.remove_unread(model, x) == 1
    assert [part.stem.out_channels for part in model] == [8, 7]
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_layers_that_others_read_by_themselves_stay():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        encoder.linear1.weight[:, 0] = 0
    model, x = nn.Sequential(encoder), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(x)
        assert tk.methods.lower_columns(model) == {}
        assert torch.equal(model(x), expected)
    alone = nn.Linear(4, 4)
    nn.init.zeros_(alone.weight[:, 0])
    assert tk.methods.lower_columns(alone) == {}


def test_channels_that_a_norm_reads_together_stay_though_no_layer_reads_them():
    """Their values still count in the statistics of the others."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight[:, :3] = 0
        model[0].weight[:3] = 0
        model[0].bias[:3] = model[0](torch.zeros(1, 4)).mean()  # about what the others are
    assert tk.methods.remove_unread(model, torch.zeros(1, 4)) == 0
    assert model[0].out_features == 8
