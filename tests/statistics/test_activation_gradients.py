"""tk.scoring(): no weight gradients, the same gates, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets


@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "taylor_fo_bn"])
def test_scores_equal_those_of_a_full_backward(criterion):
    model, data = nets.mixed(train=False), [nets.batch() for _ in range(3)]
    full, light = (tk.Importance(model, criterion) for _ in range(2))
    for d in data:
        nets.backward(model, d)
        full.update()
    light.reset()
    model.zero_grad()
    with tk.scoring(model):
        for d in data:
            nets.loss_of(model, d).backward()
            light.update()
    for name, score in full.compute().items():
        torch.testing.assert_close(light.compute()[name], score, rtol=1e-5, atol=1e-12)


def test_no_parameter_gets_a_gradient_and_old_ones_stay():
    model, data = nets.mixed(), nets.batch()
    nets.backward(model, data)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    imp = tk.Importance(model, "taylor_fo_gate")
    with tk.scoring(model) as same:
        assert same is model
        nets.loss_of(model, data).backward()
    imp.update()
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(before[name])


def test_flags_and_hooks_are_restored_even_after_an_error():
    model = nets.mixed()
    model.fc.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    inside = []

    def fail():
        with tk.scoring(model):
            inside.extend(p.requires_grad for p in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(inside)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_the_output_of_the_model_is_the_same_bits():
    model, (x, _) = nets.mixed(train=False), nets.batch()
    expected = model(x)
    with tk.scoring(model):
        assert model(x).equal(expected)
        with torch.no_grad():
            assert not model(x).requires_grad


def test_integer_inputs_and_in_place_first_layers():
    model = nn.Sequential(
        nn.Embedding(10, 6), nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    )
    imp = tk.Importance(model, "taylor_fo_gate")
    with tk.scoring(model):
        model(torch.randint(0, 10, (5, 3))).square().sum().backward()
    imp.update()
    assert (imp.compute()["3"] > 0).all()


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_abs", "snip"])
def test_criteria_that_read_weight_gradients_say_so(criterion):
    model = nets.mixed()
    imp = tk.Importance(model, criterion)
    with tk.scoring(model):
        nets.loss_of(model, nets.batch()).backward()
        with pytest.raises(RuntimeError, match=r"requires no gradient.*taylor_fo_gate"):
            imp.update()


def test_what_an_attention_is_given_stays_as_it_was():
    """Others may have kept it for their own backward pass."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            gated = self.gate(x).sigmoid() * x
            return gated + self.attention(x, x, x)[0]

    model, x = Gated(), torch.randn(5, 3, 6)
    expected = model(x)
    with tk.scoring(model):
        found = model(x)
        found.square().mean().backward()
    assert x._version == 0
    assert not x.requires_grad
    torch.testing.assert_close(found, expected)


class Padded(nn.Module):
    """An encoder of sequences of which the last steps may be padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.read, self.encoder = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.encoder(self.read(x), src_key_padding_mask=padding)
        return self.head(y) * ~padding[..., None]


@pytest.mark.parametrize("frozen", [False, True])
def test_padded_examples_of_an_encoder_are_scored_in_eval_mode(frozen):
    """Without gradients of parameters PyTorch packs them into nested tensors there."""
    torch.manual_seed(0)
    model = Padded().eval()
    x, padding = torch.randn(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2, 2:] = True
    imp = tk.Importance(model, "taylor_fo_gate", example_inputs=(x, padding))
    model.encoder.use_nested_tensor = False
    model(x, padding).square().sum().backward()
    imp.update()
    expected = imp.compute()
    imp.reset()
    model.zero_grad()
    model.encoder.use_nested_tensor = True
    model.requires_grad_(not frozen)
    with tk.scoring(model):
        model(x, padding).square().sum().backward()
        imp.update()
    assert model.encoder.use_nested_tensor
    found = imp.compute()
    assert found.keys() == expected.keys()
    for name, scores in found.items():
        torch.testing.assert_close(scores, expected[name])
