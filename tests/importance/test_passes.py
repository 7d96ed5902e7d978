"""Importance over passes that change activations in place, keep graphs, or scale their loss."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_kernels as tk
from tests.helpers import nets


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
@pytest.mark.parametrize(
    "in_place",
    [
        lambda y: F.relu(y, inplace=True),
        lambda y: F.relu6(y, inplace=True),
        lambda y: F.silu(y, inplace=True),
        lambda y: y.mul_(0.5),
        lambda y: y.add_(1.0).relu_(),
    ],
    ids=["relu", "relu6", "silu", "mul", "add then relu"],
)
def test_in_place_operations_after_a_layer(criterion, in_place):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 25, 4))

    def forward(operation, x):
        return model[2](model[1](operation(model[0](x)))).square().sum()

    imp = tk.Importance(model, criterion)
    reference = tk.Importance(copy.deepcopy(model), criterion)
    twin = reference._statistic.model
    for _ in range(3):  # the first pass learns, the others rely on it
        x = torch.randn(4, 3, 7, 7)
        model.zero_grad()
        forward(in_place, x).backward()
        imp.update()
        twin.zero_grad()
        y = in_place(twin[0](x) * 1)  # out of reach of the capture
        twin[2](twin[1](y)).square().sum().backward()
        reference.update()
    for name, score in reference.compute().items():
        torch.testing.assert_close(imp.compute()[name], score, rtol=1e-5, atol=0)


def test_an_in_place_change_after_the_first_pass_is_reported_not_miscounted():
    model = nn.Sequential(nn.Linear(4, 3))
    imp = tk.Importance(model, "taylor_fo_gate")
    model(torch.randn(2, 4)).sum().backward()
    imp.update()
    with pytest.raises(RuntimeError, match="0: its output was changed in place in this pass"):
        model(torch.randn(2, 4)).mul_(2).sum().backward()
    imp.reset()
    model(torch.randn(2, 4)).mul_(2).sum().backward()
    imp.update()
    assert imp.compute()["0"].isfinite().all()


def test_activations_are_let_go_after_backward():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    imp = tk.Importance(model, "taylor_fo_gate")
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    kept = []
    model[0].register_forward_hook(lambda _, __, y: kept.append(weakref.ref(y.untyped_storage())))
    x = model[0](torch.randn(2, 3, 8, 8))
    loss = (x * 2).sum()  # its graph outlives the backward pass
    del x
    loss.backward()
    gc.collect()
    assert kept[0]() is None
    imp.update()


def test_two_backwards_over_a_retained_graph_add_up():
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    meters = [tk.Importance(model, "taylor_fo_bn") for _ in range(2)]
    y = model(x)
    y[:, 0].sum().backward(retain_graph=True)
    y[:, 1:].square().sum().backward()
    meters[0].update()
    meters[1].reset()
    y = model(x)
    (y[:, 0].sum() + y[:, 1:].square().sum()).backward()
    meters[1].update()
    torch.testing.assert_close(meters[0].compute()[""], meters[1].compute()[""])


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate"])
def test_loss_scale_is_divided_out(criterion):
    model, data = nets.mixed(train=False), nets.batch()
    scores = []
    for scale in (1.0, 1024.0):
        imp = tk.Importance(model, criterion)
        model.zero_grad()
        (nets.loss_of(model, data) * scale).backward()
        imp.update(loss_scale=scale)
        scores.append(imp.compute())
        imp.close()
    for name in scores[0]:
        torch.testing.assert_close(scores[1][name], scores[0][name], rtol=1e-5, atol=0)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="loss_scale"):
            imp.update(loss_scale=bad)


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
def test_gates_do_not_depend_on_what_is_done_to_grad_after_backward(criterion):
    """Behind a BatchNorm and elsewhere alike: unscaled, clipped, or kept from an earlier pass."""
    model, data = nets.mixed(train=False), nets.batch()
    scores = []
    for change in ("none", "unscale", "clip", "keep"):
        imp = tk.Importance(model, criterion)
        if change == "keep":  # no zero_grad() after another update
            nets.backward(model, nets.batch())
            imp.update()
            imp.reset()
        else:
            model.zero_grad()
        scale = 1024.0 if change == "unscale" else 1.0
        (nets.loss_of(model, data) * scale).backward()
        if change == "unscale":
            for parameter in model.parameters():
                parameter.grad /= scale
        if change == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        imp.update(loss_scale=scale)
        scores.append(imp.compute())
        imp.close()
    for other in scores[1:]:
        for name, score in scores[0].items():
            torch.testing.assert_close(other[name], score, rtol=1e-5, atol=0)
