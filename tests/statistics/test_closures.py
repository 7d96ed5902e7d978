"""Criteria that run the model themselves: what they must not disturb, and what awkward cases do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic
from tests.helpers import nets

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSURES = [
    name
    for name in tk.criterion_names()
    if name != "oracle" and get_statistic(get_criterion(name).statistic).reads == "closure"
]
AT_OUTPUT = [
    "taylor_so_diag", "taylor_so_diag_exact", "obd_bn", "obd_bn_exact", "obd_fisher_mc"
]  # fmt: skip


def scores(model: nn.Module, criterion: str, closure: Callable[[], Tensor], **options) -> dict:
    with closing(tk.Importance(model, criterion, **options)) as imp:
        imp.update(closure=closure)
        return imp.compute()


def same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(got[name] / scale, want / scale, rtol=0, atol=rtol)


def test_there_are_such_criteria():
    assert {"taylor_so", "taylor_so_bn", "taylor_so_diag", "obd_bn", "obd_fisher_mc"} <= set(
        CLOSURES
    )
    assert "obd_hutchinson" in CLOSURES


@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("criterion", CLOSURES)
def test_leaves_what_a_forward_pass_leaves(criterion, caller):
    class Noisy(nets.Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.3, self.training))

    model, data = Noisy().double(), nets.batch()
    model.plain.weight.requires_grad_(False)
    nets.backward(model, data)
    inputs = data[0].clone().requires_grad_()
    imp = tk.Importance(model, criterion)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = {}
    for who in ("forward", "update"):
        model.load_state_dict(before)
        torch.manual_seed(3)
        with caller():
            if who == "forward":
                model(inputs)
            else:
                imp.update(closure=lambda: F.cross_entropy(model(inputs), data[1]))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        seen[who] = state | {"random numbers": torch.get_rng_state()}
    assert all(value.equal(seen["update"][name]) for name, value in seen["forward"].items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or p.grad.equal(grads[name])
    assert inputs.grad is None
    assert model.training
    imp.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("criterion", CLOSURES)
def test_scores_do_not_depend_on_what_is_frozen_or_on_other_passes(criterion):
    model, data = nets.mixed(train=False), nets.batch()
    closure = functools.partial(nets.loss_of, model, data)
    expected = scores(model, criterion, closure)
    imp = tk.Importance(model, criterion)
    nets.backward(model, nets.batch())  # a training step in between
    with torch.no_grad():
        model(nets.batch()[0])
    imp.update(closure=closure)
    same(imp.compute(), expected)
    with tk.scoring(model):
        same(scores(model, criterion, closure), expected)
    for part in (model.stem, model.stem_bn, model.plain):
        part.requires_grad_(False)
    same(scores(model, criterion, closure), expected)


@pytest.mark.sample(12)
@pytest.mark.parametrize("other", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "obd_fisher"])
@pytest.mark.parametrize("criterion", CLOSURES)
def test_another_meter_on_the_model_does_not_count_the_closures_passes(criterion, other):
    model, data = nets.mixed(train=False), [nets.batch() for _ in range(2)]
    results = []
    for beside in (False, True):
        imp, meter = tk.Importance(model, other), tk.Importance(model, criterion)
        for d in data:
            model.zero_grad()
            for step in ("forward", "backward", "update"):
                if beside:
                    meter.update(closure=lambda d=d: nets.loss_of(model, d))
                if step == "forward":
                    loss = nets.loss_of(model, d)
                elif step == "backward":
                    loss.backward()
            imp.update()
        results.append(imp.compute())
        imp.close()
    for name, score in results[0].items():
        assert results[1][name].equal(score)


@pytest.mark.parametrize("criterion", CLOSURES)
def test_another_thread_trains_and_scores_while_a_closure_runs(criterion):
    model, other, data = nets.mixed(train=False), nets.mixed(train=False), nets.batch()
    imp, meter = tk.Importance(model, criterion), tk.Importance(other, "taylor_fo_gate")

    def closure() -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: nets.loss_of(other, data).backward()).result()
        return nets.loss_of(model, data)

    imp.update(closure=closure)
    meter.update()
    alone = tk.Importance(other, "taylor_fo_gate")
    nets.loss_of(other, data).backward()
    alone.update()
    for name, score in alone.compute().items():
        assert meter.compute()[name].equal(score)


@pytest.mark.parametrize("criterion", CLOSURES)
def test_after_an_error_the_next_update_is_as_if_there_had_been_none(criterion):
    model, data = nets.mixed(train=False), nets.batch()
    imp, other = tk.Importance(model, criterion), tk.Importance(model, criterion)

    def fail() -> Tensor:
        nets.loss_of(model, data)
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        imp.update(closure=fail)
    assert all(p.requires_grad for p in model.parameters())
    for meter in (imp, other):
        meter.update(closure=lambda: nets.loss_of(model, data))
    for name, score in other.compute().items():
        assert imp.compute()[name].equal(score)


@pytest.mark.parametrize("criterion", CLOSURES)
def test_gradients_that_a_closure_takes_are_not_scored(criterion):
    model, (x, y) = nets.mixed(train=False), nets.batch()
    expected = scores(model, criterion, lambda: nets.loss_of(model, (x, y)))
    x.requires_grad_()

    def closure() -> Tensor:
        loss = nets.loss_of(model, (x, y))
        torch.autograd.grad(loss, x, retain_graph=True)  # to weigh or to clip something by it
        return loss

    same(scores(model, criterion, closure), expected)


@pytest.mark.parametrize("criterion", CLOSURES)
def test_a_closure_as_an_optimizer_takes_it_is_one_clear_error(criterion):
    model, data = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, criterion)
    with pytest.raises(ValueError, match=r"closure: a backward pass in it .* without backward\(\)"):
        imp.update(closure=lambda: nets.backward(model, data))
    imp.update(closure=lambda: nets.loss_of(model, data))
    same(imp.compute(), scores(model, criterion, lambda: nets.loss_of(model, data)))


@pytest.mark.parametrize("criterion", CLOSURES)
def test_a_loss_that_depends_on_no_layer_that_is_scored_is_one_clear_error(criterion):
    model, (x, y) = nets.mixed(train=False), nets.batch()
    with pytest.raises(ValueError, match=r"closure: its loss (depends on none|does not depend)"):
        scores(model, criterion, lambda: F.cross_entropy(model(x).detach().requires_grad_(), y))


@pytest.mark.parametrize("criterion", CLOSURES)
def test_an_empty_batch_scores_zero_or_is_one_clear_error(criterion):
    model, data = nets.mixed(train=False), nets.batch(0)
    if criterion in AT_OUTPUT:
        with pytest.raises(ValueError, match="closure: what the model returned is empty"):
            scores(model, criterion, lambda: nets.loss_of(model, data))
        return
    for score in scores(model, criterion, lambda: nets.loss_of(model, data)).values():
        assert not score.any()


@pytest.mark.parametrize("criterion", CLOSURES)
def test_same_bits_again_and_after_a_state_dict(criterion):
    model, data = nets.mixed(train=False), [nets.batch() for _ in range(3)]
    imp = tk.Importance(model, criterion)
    results = []
    for _ in range(2):
        imp.reset()
        for d in data:
            imp.update(closure=lambda d=d: nets.loss_of(model, d))
        results.append(imp.compute())
    resumed = tk.Importance(model, criterion)
    for d in data[:2]:
        resumed.update(closure=lambda d=d: nets.loss_of(model, d))
    state = resumed.state_dict()
    resumed = tk.Importance(model, criterion)
    resumed.load_state_dict(state)
    resumed.update(closure=lambda: nets.loss_of(model, data[2]))
    results.append(resumed.compute())
    for other in results[1:]:
        assert all(score.equal(results[0][name]) for name, score in other.items())


@pytest.mark.parametrize("criterion", CLOSURES)
def test_activation_checkpointing(criterion):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 3)
            self.saves = False

        def block(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = checkpoint(self.block, x, use_reentrant=False) if self.saves else self.block(x)
            return self.head(x.mean((2, 3)))

    model, (x, y) = Net().double().eval(), nets.batch()
    y = y % 3
    expected = scores(model, criterion, lambda: F.cross_entropy(model(x), y))
    model.saves = True
    same(scores(model, criterion, lambda: F.cross_entropy(model(x), y)), expected)


class Shared(nn.Module):
    """One layer used twice, behind it a BatchNorm the first time and none the second."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(F.relu(self.norm(self.conv(x)))).relu_().mean((2, 3)))


def test_a_layer_used_twice_has_one_gate_over_both_uses():
    model, (x, y) = Shared().double().eval(), nets.batch()
    y = y % 4

    def loss_of(gate: Tensor) -> Tensor:
        g = gate[:, None, None]
        z = F.relu(model.norm(model.conv(x)) * g)
        return F.cross_entropy(model.fc((model.conv(z) * g).relu().mean((2, 3))), y)

    ones = torch.ones(3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss_of, ones)
    hessian = torch.autograd.functional.hessian(loss_of, ones)
    got = scores(model, "taylor_so_bn", lambda: F.cross_entropy(model(x), y), layers=["conv"])
    same(got, {"conv": (slope - hessian.sum(1) / 2).square().float()})


@dataclass
class Output:
    logits: Tensor
    labels: Tensor


@pytest.mark.parametrize("criterion", CLOSURES)
@pytest.mark.parametrize("kind", ["tuple", "dict", "object"])
def test_outputs_in_containers(kind, criterion):
    wrap = {
        "tuple": lambda out: (out, None, "name"),
        "dict": lambda out: {"logits": out, "loss": out.mean(), "step": 3},
        "object": lambda out: Output(out, torch.zeros(3, dtype=torch.int64)),
    }[kind]

    class Wrapped(nets.Mixed):
        def forward(self, x: Tensor):
            return wrap(super().forward(x))

    model, (x, y) = Wrapped().double().eval(), nets.batch()
    pick = {"tuple": lambda o: o[0], "dict": lambda o: o["logits"], "object": lambda o: o.logits}
    got = scores(model, criterion, lambda: F.cross_entropy(pick[kind](model(x)), y))
    plain = nets.mixed(train=False)
    plain.load_state_dict(model.state_dict())
    same(got, scores(plain, criterion, lambda: F.cross_entropy(plain(x), y)))
