"""tk.methods.MirrorDescent: runs that are resumed, and what a state brings back."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.methods import MirrorDescent
from tests.methods.mirror_training import FAST, each_kind, network, quantized, same_bits, train


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_with_the_same_bits(method, levels, dtype):
    def build(seed):
        model = network(seed).to(dtype)
        optimizer = MirrorDescent(
            model.parameters(), method=method, levels=levels, scale="layer", **FAST
        )
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    def go_on(model, optimizer, scheduler, first, steps):
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
            scheduler.step()

    straight = build(0)
    go_on(*straight, 0, 10)
    killed = build(0)
    go_on(*killed, 0, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in killed], file)
    go_on(*killed, 5, 2)  # what was saved does not change with it
    resumed = build(1)
    states = torch.load(io.BytesIO(file.getvalue()))
    resumed[0].load_state_dict(states[0])
    resumed[1].load_state_dict(states[1])
    resumed[2].load_state_dict(states[2])
    go_on(*resumed, 5, 5)
    for one, two in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert same_bits(one.detach(), two.detach())
    for one, two in zip(
        straight[1].state_dict()["state"].values(),
        resumed[1].state_dict()["state"].values(),
        strict=True,
    ):
        assert all(
            same_bits(one[key], two[key]) if torch.is_tensor(one[key]) else one[key] == two[key]
            for key in one.keys() | two.keys()
        )


def test_a_state_alone_brings_the_weights_back():
    """Also after the model was laid out anew, and for a copy of the optimizer."""
    model = network()
    optimizer = MirrorDescent(model.parameters(), **FAST)
    train(model, optimizer, 5)
    other = network(3)
    resumed = MirrorDescent(other.parameters(), **FAST)
    resumed.load_state_dict(optimizer.state_dict())
    for one, two in zip(quantized(model), quantized(other), strict=True):
        assert one.equal(two)
    last = network(4).to(memory_format=torch.channels_last)
    turned = MirrorDescent(last.parameters(), **FAST)
    turned.load_state_dict(optimizer.state_dict())
    for one, two in zip(quantized(model), quantized(last), strict=True):
        assert one.equal(two)
    pair = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, first=5)
    train(*pair, 2, first=5)
    for one, two in zip(model.parameters(), pair[0].parameters(), strict=True):
        assert one.equal(two)


def test_a_model_laid_out_anew_goes_on():
    models = [network(), network()]
    optimizers = [MirrorDescent(model.parameters(), **FAST) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    models[1].to(memory_format=torch.channels_last)
    assert not models[1][0].weight.is_contiguous()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3, first=3)
    for one, two in zip(*(quantized(model) for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_state_of_before_the_option_start_is_taken():
    model = torch.nn.Linear(3, 2)
    optimizer = tk.methods.MirrorDescent(model.parameters())
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["start"]
    again = torch.nn.Linear(3, 2)
    its = tk.methods.MirrorDescent(again.parameters(), start="spread")
    its.load_state_dict(state)
    assert "start" not in state["param_groups"][0]  # it is the caller's
    assert its.param_groups[0]["start"] == "weights"
    assert torch.equal(again.weight, model.weight)
