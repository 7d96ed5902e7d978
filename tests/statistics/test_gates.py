"""Gates in awkward networks: sums in place, shared modules, checkpoints, dropped meters."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk

GATES = ("taylor_fo_bn", "taylor_fo_gate")


class PreActivation(nn.Module):
    """A BatchNorm that belongs to the residual stream, not to the convolution before the sum."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.stream = nn.BatchNorm2d(4)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x).sigmoid()
        y = self.c2(x)
        if self.in_place:
            y += x
        else:
            y = y + x
        return self.c3(self.stream(y))


def scores_over(model: nn.Module, criterion: str, inputs: list, loss=None, **update) -> dict:
    imp = tk.Importance(model, criterion)
    for x in inputs:
        model.zero_grad()
        (loss or (lambda y: y.square().sum()))(model(x)).backward()
        imp.update(**(update if imp.needs_closure else {}))
    result = imp.compute()
    imp.close()
    return result


@pytest.mark.parametrize("criterion", [*GATES, "oracle"])
def test_a_norm_behind_a_sum_in_place_follows_no_layer(criterion):
    torch.manual_seed(1)
    twins = PreActivation(False).double().eval(), PreActivation(True).double().eval()
    twins[1].load_state_dict(twins[0].state_dict())
    inputs = [torch.randn(3, 4, 6, 6, dtype=torch.float64) for _ in range(3)]
    results = []
    for model in twins:
        closure = {"closure": lambda m=model: m(inputs[0]).square().sum()}
        results.append(scores_over(model, criterion, inputs, **closure))
    for name, score in results[0].items():
        torch.testing.assert_close(results[1][name], score, rtol=1e-5, atol=0)


class OverTokens(nn.Module):
    """A BatchNorm right behind a linear layer, of its tokens (dim 1) and not of its neurons."""

    def __init__(self, neurons: int, seen: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(5, neurons), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)  # [N, tokens, neurons]
        if self.seen:
            x = self.norm(x)
        else:
            n = self.norm
            x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)
        return self.head(x.sigmoid().mean(2))


@pytest.mark.parametrize("criterion", [*GATES, "taylor_so_bn", "obd_bn", "oracle"])
@pytest.mark.parametrize("neurons", [4, 6])
def test_a_norm_over_another_dimension_than_the_channels_follows_no_layer(criterion, neurons):
    twins = [OverTokens(neurons, seen).double().eval() for seen in (False, True)]
    nn.init.normal_(twins[0].norm.running_mean)
    twins[1].load_state_dict(twins[0].state_dict())
    inputs = [torch.randn(3, 4, 5, dtype=torch.float64)]
    results = []
    for model in twins:
        closure = {"closure": lambda m=model: m(inputs[0]).square().sum()}
        results.append(scores_over(model, criterion, inputs, **closure))
    for name, score in results[0].items():
        assert (score > 0).all()
        torch.testing.assert_close(results[1][name], score, rtol=1e-5, atol=0)


@pytest.mark.parametrize("criterion", [*GATES, "taylor_so_bn", "obd_bn", "bn_scale", "oracle"])
def test_modules_that_are_given_their_input_by_name(criterion):
    class Net(nn.Module):
        def __init__(self, by_name: bool) -> None:
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.by_name = by_name

        def forward(self, x: Tensor) -> Tensor:
            if self.by_name:
                return self.head(input=self.norm(input=self.fc(input=x)).sigmoid())
            return self.head(self.norm(self.fc(x)).sigmoid())

    twins = [Net(by_name).double() for by_name in (False, True)]
    twins[1].load_state_dict(twins[0].state_dict())
    inputs = [torch.randn(7, 5, dtype=torch.float64)]
    results = []
    for model in twins:
        closure = {"closure": lambda m=model: m(inputs[0]).square().sum()}
        results.append(scores_over(model, criterion, inputs, **closure))
    assert (results[0]["fc"] > 0).all()
    assert results[1]["fc"].equal(results[0]["fc"])


def test_an_identity_at_first_teaches_nothing_about_in_place_changes():
    """As in ReZero and LoRA: what is added in place is 0 in the first pass, and later is not."""

    class ReZero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.scale = 0.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y += self.scale * self.b(x)
            return self.head(y)

    model = ReZero()
    imp = tk.Importance(model, "taylor_fo_gate", layers=["a"])
    for scale in (0.0, 0.0, 2.0, 2.0):
        model.scale = scale
        x = torch.randn(4, 5)
        imp.reset()
        model(x).square().sum().backward()
        imp.update()
        y = (model.a(x) * 1).detach().requires_grad_()
        model.head(y + scale * model.b(x)).square().sum().backward()
        expected = ((y - model.a.bias) * y.grad).square().mean(0)
        torch.testing.assert_close(imp.compute()["a"], expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [("silu", "relu"), ("relu", "silu"), ("relu", "none")])
def test_a_module_used_twice_with_different_operations_in_place(order):
    operations = {
        "silu": lambda y: F.silu(y, inplace=True),
        "relu": lambda y: F.relu(y, inplace=True),
        "none": lambda y: y,
    }
    first, second = (operations[name] for name in order)
    fc = nn.Linear(5, 5)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = fc

        def forward(self, x: Tensor) -> Tensor:
            return second(self.fc(first(self.fc(x)))) * 1.5

    model = Shared()
    imp = tk.Importance(model, "taylor_fo_gate")
    for _ in range(3):
        x = torch.randn(6, 5)
        imp.reset()
        model(x).square().sum().backward()
        imp.update()
        gate = torch.ones(6, 5, requires_grad=True)

        def gated(y: Tensor, gate: Tensor = gate) -> Tensor:
            return gate * (y - fc.bias) + fc.bias

        y = second(gated(fc(first(gated(fc(x))))) * 1) * 1.5
        (expected,) = torch.autograd.grad(y.square().sum(), gate)
        torch.testing.assert_close(
            imp.compute()["fc"], expected.square().mean(0), rtol=1e-4, atol=1e-6
        )


def test_running_a_reported_pass_again_counts_it_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)})

    def run(x: Tensor, change: bool) -> None:
        y = model["a"](x)
        if change:
            y.mul_(2)
        model["b"](y).square().sum().backward()

    inputs = [torch.randn(5, 4) for _ in range(2)]
    imp = tk.Importance(model, "taylor_fo_bn")
    run(inputs[0], False)
    imp.update()
    with pytest.raises(RuntimeError, match="run the pass again"):
        run(inputs[1], True)
    run(inputs[1], True)
    imp.update()
    imp.close()
    singles = []
    for x, change in zip(inputs, (False, True), strict=True):
        single = tk.Importance(model, "taylor_fo_bn")
        run(x, change)
        single.update()
        singles.append(single.compute())
        single.close()
    for name, score in imp.compute().items():
        expected = (singles[0][name] + singles[1][name]) / 2
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-7)


def test_a_dropped_meter_takes_its_hooks_along():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    for criterion in (*GATES, "bn_scale", "oracle"):
        imp = tk.Importance(model, criterion)
        for _ in range(2):
            model(x).sum().backward()
        del imp
        gc.collect()
        model(x).sum().backward()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("criterion", GATES)
@pytest.mark.parametrize("behind", ["two layers", "a layer and nothing"])
def test_a_norm_shared_by_two_places_scores_each_by_its_own_output(criterion, behind):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)
            nn.init.normal_(self.norm.weight, 1, 0.3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.c1(x)).sigmoid()
            return self.norm(self.c2(x) if behind == "two layers" else x * 2)

    model = Shared().double()
    inputs = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    trained = scores_over(model, criterion, inputs)
    model.norm.requires_grad_(False)  # then there is nothing to read but outputs
    frozen = scores_over(model, criterion, inputs)
    for name, score in frozen.items():
        torch.testing.assert_close(trained[name], score, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("criterion", GATES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(criterion, use_reentrant):
    class Net(nn.Module):
        def __init__(self, saves: bool) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 2, 1)
            self.saves = saves

        def block(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.saves:
                return self.head(checkpoint(self.block, x, use_reentrant=use_reentrant))
            return self.head(self.block(x))

    plain, saving = Net(False).double().eval(), Net(True).double().eval()
    saving.load_state_dict(plain.state_dict())
    inputs = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    expected, got = (scores_over(model, criterion, inputs) for model in (plain, saving))
    for name, score in expected.items():
        torch.testing.assert_close(got[name], score, rtol=1e-6, atol=1e-12)


def test_two_calls_before_one_backward_are_examples_of_their_own():
    model = nn.Linear(4, 3)
    halves = torch.randn(2, 5, 4)
    split, whole = (tk.Importance(model, "taylor_fo_gate") for _ in range(2))
    (model(halves[0]).square().sum() + model(halves[1]).square().sum()).backward()
    split.update()
    whole.reset()
    model(halves.flatten(0, 1)).square().sum().backward()
    whole.update()
    torch.testing.assert_close(split.compute()[""], whole.compute()[""])
    torch.testing.assert_close(split.standard_error()[""], whole.standard_error()[""])
