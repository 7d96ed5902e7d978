"""tk.methods.MirrorDescent: the verbs of a torch Optimizer, and what each method promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taylor_kernels as tk
from taylor_kernels.methods import MirrorDescent
from tests.methods.mirror_training import FAST, each_kind, network, quantized, same_bits, train


@pytest.mark.sample(14)
@each_kind
@pytest.mark.parametrize("scale", [None, "layer", 0.25])
def test_weights_are_within_the_scale_and_become_levels(method, levels, scale):
    model = network()
    means = [param.detach().abs().mean().item() for param in quantized(model)]
    optimizer = MirrorDescent(model.parameters(), method=method, levels=levels, scale=scale, **FAST)
    for steps in (0, 1, 20):
        train(model, optimizer, steps)
        for param, mean in zip(quantized(model), means, strict=True):
            alpha = {"layer": mean}.get(scale, scale or 1.0)
            assert param.detach().abs().max().item() <= alpha * (1 + 1e-6)
    report = optimizer.quantize(lambda: sum(p.sum().item() for p in quantized(model)))
    for param, mean in zip(quantized(model), means, strict=True):
        alpha = {"layer": mean}.get(scale, scale or 1.0)
        found = (param.detach() / alpha).unique()
        wanted = torch.tensor([-1.0, 0.0, 1.0] if levels == "ternary" else [-1.0, 1.0])
        assert (found[:, None] - wanted).abs().amin(1).max() < 1e-6
    assert report.weights == sum(param.numel() for param in quantized(model))
    assert report.zeros == sum((param == 0).sum().item() for param in quantized(model))
    assert report.hard == sum(param.sum().item() for param in quantized(model))
    assert str(report.hard) in str(report)


@given(seed=st.integers(0, 2**20), lr=st.floats(1e-3, 10), steps=st.integers(1, 8))
@settings(max_examples=20)
def test_what_the_stable_forms_store_is_not_bound(seed, lr, steps):
    """x̃ leaves [-1, 1] as far as gradients push it; the weights do not."""
    model = network(seed)
    optimizer = MirrorDescent(model.parameters(), lr=lr, optimizer="sgd", momentum=0, beta_scale=1)
    started = [optimizer.state[param]["value"].clone() for param in quantized(model)]
    pushed = [torch.randn_like(param).sign() * 10 for param in quantized(model)]
    for _ in range(steps):
        for param, grad in zip(quantized(model), pushed, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    for param, start, grad in zip(quantized(model), started, pushed, strict=True):
        value = optimizer.state[param]["value"]
        torch.testing.assert_close(value, start - steps * lr * grad, rtol=1e-4, atol=1e-4)
        assert param.detach().abs().max() <= 1


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_md_tanh_s_is_the_torch_optimizer_of_its_dual(optimizer_name):
    """x̃ moves as torch.optim moves a tensor that is given the gradients by w."""
    model = network()
    model[0].bias.requires_grad_(False)  # before a norm: its gradient is what rounding leaves
    options = dict(optimizer=optimizer_name, eps=1e-12, beta_scale=1.1, beta_interval=2)
    ours = MirrorDescent(model.parameters(), lr=0.01, **options)
    every = [param for param in model.parameters() if param.requires_grad]
    duals = [ours.state[p]["value"].clone() if p.dim() > 1 else p.detach().clone() for p in every]
    plain = (
        torch.optim.Adam(duals, lr=0.01, eps=1e-12)
        if optimizer_name == "adam"
        else torch.optim.SGD(duals, lr=0.01, momentum=0.9)
    )
    beta = 1.1
    for step in range(1, 8):
        train(model, ours, 1, first=step)
        for dual, param in zip(duals, every, strict=True):
            dual.grad = param.grad.clone()
        plain.step()
        beta *= 1.1 if step % 2 == 0 else 1
        for dual, param in zip(duals, every, strict=True):
            wanted = torch.tanh(beta * dual) if param.dim() > 1 else dual
            torch.testing.assert_close(param.detach(), wanted, rtol=1e-5, atol=1e-5)


def test_a_binary_softmax_is_a_tanh():
    models = [network(), network()]
    for model, method in zip(models, ("md-tanh-s", "md-softmax-s"), strict=True):
        train(model, MirrorDescent(model.parameters(), method=method, optimizer="sgd", **FAST), 8)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stable", ["md-tanh-s", "md-softmax-s"])
def test_the_plain_form_is_the_stable_one_while_float32_holds(stable):
    """With β fixed both follow one path; in float64 for long."""
    models = [network().double(), network().double()]
    for model, method in zip(models, (stable, stable.removesuffix("-s")), strict=True):
        optimizer = MirrorDescent(
            model.parameters(), lr=0.1, method=method, optimizer="sgd", beta_scale=1
        )
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_plain_form_freezes_where_float32_rounds_to_the_levels():
    """x = 1 exactly: no later gradient moves it, while x̃ comes back."""
    for method, comes_back in (("md-tanh", False), ("md-tanh-s", True)):
        layer = nn.Linear(4, 4, bias=False)
        optimizer = MirrorDescent(
            layer.parameters(), lr=1.0, method=method, optimizer="sgd", momentum=0, beta_scale=1
        )
        for sign in (-1.0, 1.0):
            for _ in range(30):
                layer.weight.grad = torch.full((4, 4), sign)
                optimizer.step()
            if sign < 0:
                assert (layer.weight == 1).all()
        assert (layer.weight < 0.9).all() == comes_back


def test_beta_grows_at_its_interval_and_not_beyond_its_greatest():
    model = network()
    optimizer = MirrorDescent(
        model.parameters(), beta=2, beta_scale=1.5, beta_interval=3, beta_max=8
    )
    seen = []
    for step in range(12):
        seen.append(optimizer.param_groups[0]["beta"])
        train(model, optimizer, 1, first=step)
    assert seen == [3.0] * 3 + [4.5] * 3 + [6.75] * 3 + [8] * 3


def test_schedulers_set_the_rate():
    """A rate of 0 moves nothing, at whatever time it is set."""
    model = network()
    optimizer = MirrorDescent(model.parameters(), beta_scale=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    train(model, optimizer, 2, scheduler=scheduler)
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, 2, scheduler=scheduler)
    for one, two in zip(before, model.parameters(), strict=True):
        assert one.equal(two)


def test_autocast_in_bfloat16_trains_and_quantizes():
    model = network()
    optimizer = MirrorDescent(model.parameters(), scale="layer", **FAST)
    x, y = torch.randn(32, 2, 4, 4), torch.randint(5, (32,))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(x), y)

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.quantize()
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert loss().item() < 0.7 * first


def test_other_layers_are_left_alone():
    """What is not given, and what has no gradient."""
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = MirrorDescent([model[4].weight], **FAST)
    started = model[4].weight.detach().clone()
    for _ in range(3):
        model[4].weight.grad = torch.randn_like(model[4].weight)
        model[0].weight.grad = torch.randn_like(model[0].weight)
        optimizer.step()
    assert not started.equal(model[4].weight)
    for name, value in model.state_dict().items():
        assert name == "4.weight" or value.equal(before[name])


def test_a_parameter_without_a_gradient_keeps_its_value_and_follows_beta():
    model = network()
    optimizer = MirrorDescent(model.parameters(), beta_scale=2, beta_interval=1)
    value = optimizer.state[model[0].weight]["value"].clone()
    bias = model[4].bias.detach().clone()
    model[4].weight.grad = torch.randn_like(model[4].weight)
    optimizer.step()
    assert optimizer.state[model[0].weight]["value"].equal(value)
    torch.testing.assert_close(model[0].weight.detach(), torch.tanh(4 * value))
    assert model[4].bias.equal(bias)


@each_kind
def test_rounded_is_for_a_while(method, levels):
    model = network()
    optimizer = MirrorDescent(model.parameters(), method=method, levels=levels, **FAST)
    train(model, optimizer, 4)
    soft = [param.detach().clone() for param in model.parameters()]
    with optimizer.rounded():
        hard = [param.detach().clone() for param in quantized(model)]
    assert all(set(w.unique().tolist()) <= {-1.0, 0.0, 1.0} for w in hard)
    for before, param in zip(soft, model.parameters(), strict=True):
        assert same_bits(before, param.detach())
    optimizer.quantize()
    for before, param in zip(hard, quantized(model), strict=True):
        assert before.equal(param)
    again = MirrorDescent(network(1).parameters(), method=method, levels=levels, **FAST)
    again.load_state_dict(optimizer.state_dict())
    for before, param in zip(hard, quantized_of(again), strict=True):
        assert before.equal(param)


def test_what_is_done_while_weights_are_rounded_is_undone_or_kept():
    model, added = network(), nn.Linear(3, 2)
    optimizer = MirrorDescent(model.parameters(), **FAST)
    train(model, optimizer, 2)
    soft = [param.detach().clone() for param in model.parameters()]
    with optimizer.rounded():
        optimizer.quantize()
        optimizer.add_param_group({"params": list(added.parameters())})
        of_added = added.weight.detach().clone()
    assert [group["rounded"] for group in optimizer.param_groups] == [False, False]
    assert added.weight.equal(of_added)
    for before, param in zip(soft, model.parameters(), strict=True):
        assert same_bits(before, param.detach())


def quantized_of(optimizer: MirrorDescent) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1]


def test_first_and_last_layers_can_stay_in_float():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    before = [param.detach().clone() for param in model.parameters()]
    groups = tk.methods.parameter_groups(model, first=False, last=False, scale="layer")
    optimizer = MirrorDescent(groups)
    changed = [not a.equal(b) for a, b in zip(before, model.parameters(), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, new in zip(names, changed, strict=True) if new] == ["1.weight"]
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == (
        sorted(names)
    )
    everything = MirrorDescent(model.parameters(), quantize="all")
    assert all("value" in state for state in everything.state.values())
    with pytest.raises(ValueError, match="model: it has 1 layers with matrices, and none is left"):
        tk.methods.parameter_groups(nn.Linear(2, 2), last=False)


def test_a_closure_gives_its_loss():
    model = network()
    optimizer = MirrorDescent(model.parameters())
    x = torch.randn(4, 2, 4, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert optimizer.param_groups[0]["iteration"] == 1


@pytest.mark.parametrize("method", ["md-tanh-s", "gd-tanh", "binaryconnect"])
def test_ternary_levels_are_thirds_of_the_line_cut_at_one_half(method):
    """P_∞(x̃) is −1 below −½, 0 between and 1 above ½, whatever the weights are scaled to."""
    layer = nn.Linear(64, 64, bias=False)
    start = layer.weight.detach().clone()
    optimizer = MirrorDescent(
        layer.parameters(), method=method, levels="ternary", start="spread", beta=1e6
    )
    x = (start.double() / start.double().abs().max()).float()
    expected = (x > 0.5).float() - (x < -0.5).float()
    clear = (x.abs() - 0.5).abs() > 1e-4
    assert layer.weight.detach()[clear].equal(expected[clear])
    assert 0.4 < optimizer.quantize().zeros / x.numel() < 0.6  # of a uniform start


def test_a_usual_start_is_all_zero_between_ternary_levels():
    """What `start="spread"` is there for: x̃ of at most 1/√64 are far within ±½."""
    layer = nn.Linear(64, 64, bias=False)
    assert layer.weight.abs().max() < 0.5
    optimizer = MirrorDescent(layer.parameters(), levels="ternary", beta=100.0)
    report = optimizer.quantize()
    assert report.zeros == report.weights == 64 * 64
