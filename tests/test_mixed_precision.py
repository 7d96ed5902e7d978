"""Scores in half precision: the scale divided out, before clipping or after; underflow is told."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.data import load_digits
from taylor_kernels.studies.networks import DigitsResNet
from tests.helpers.half_precision import batches, gradients, network

pytestmark = pytest.mark.usefixtures("one_thread")
CRITERIA = ["taylor_fo_bn", "taylor_fo", "taylor_fo_gate", "taylor_abs", "obd_fisher"]


def scaled(criterion, scale=2.0**12, unscale=None, clip=None, dtype=torch.float16, count=4):
    """A loop with a scaler.

    Args:
        unscale: "before" or "after" update(), or not at all.
        clip: the norm to clip to, right after unscaling.
    """
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    imp = tk.Importance(model, criterion, scaler=scaler)
    for batch in batches(count):
        gradients(model, optimizer, scaler, batch, dtype)
        if unscale == "before":
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        imp.update()
        if unscale == "after":
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return imp


def exact(criterion):
    model = network()
    imp = tk.Importance(model, criterion)
    for x, y in batches():
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        imp.update()
    return imp.compute()


def rank_correlation(found, wanted):
    """Spearman's, over all filters of a network, which are pruned in one ranking."""
    ranks = [torch.cat([*scores.values()]).argsort().argsort() for scores in (found, wanted)]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


@pytest.fixture(scope="module")
def demo():
    """The network of `make demo`, trained a little, and minibatches of its digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, model = load_digits().train, DigitsResNet()
    chosen = torch.randperm(len(train.images))[:480].split(24)
    data = [(train.images[part], train.labels[part]) for part in chosen]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model, data[:4]


def scored(demo, dtype):
    """Scores by criterion under autocast, of bfloat16 parameters ("parameters"), or in float32."""
    model, data = copy.deepcopy(demo[0]), demo[1]
    if dtype == "parameters":
        model = model.bfloat16()
        data = [(x.bfloat16(), y) for x, y in data]
        dtype = None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
    meters = {name: tk.Importance(model, name, scaler=scaler) for name in CRITERIA}
    for x, y in data:
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        for imp in meters.values():
            imp.update()
    return {name: imp.compute() for name, imp in meters.items()}


def test_half_precision_ranks_as_float32(demo):
    wanted = scored(demo, None)
    # Relative errors of a layer's scores. A gate's slope is a sum that cancels once a network is
    # trained, and which one that is depends on processor and threads: float16 was off by 0.07.
    for dtype, bound in ((torch.float16, 0.1), (torch.bfloat16, 0.4), ("parameters", 0.4)):
        found = scored(demo, dtype)
        for criterion in CRITERIA:
            assert rank_correlation(found[criterion], wanted[criterion]) >= 0.99, dtype
            for name, value in wanted[criterion].items():
                error = (found[criterion][name] - value).norm()
                assert error <= bound * value.norm(), (dtype, criterion, name)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_there_is_no_order_to_get_wrong(criterion):
    wanted = scaled(criterion).compute()
    for unscale in ("before", "after"):
        found = scaled(criterion, unscale=unscale).compute()
        for name, value in wanted.items():
            assert torch.equal(found[name], value)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scales_that_are_no_power_of_two(criterion):
    found, wanted = scaled(criterion, 3000.0).compute(), scaled(criterion).compute()
    assert rank_correlation(found, wanted) >= 0.99


def test_clipping_shows_in_weight_criteria_where_it_comes_before():
    clip = 1e-3
    whole = scaled("taylor_fo", count=1).compute()
    for unscale in ("after", None):
        after = scaled("taylor_fo", unscale=unscale, clip=clip, count=1).compute()
        assert all(torch.equal(after[name], value) for name, value in whole.items())
    model = network()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu")
    gradients(model, optimizer, scaler, batches(1)[0])
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    before = scaled("taylor_fo", 2.0**16, unscale="before", clip=clip, count=1).compute()
    large = scaled("taylor_fo", 2.0**16, count=1).compute()
    for name, value in large.items():
        torch.testing.assert_close(before[name], value * (clip / norm) ** 2, rtol=1e-3, atol=0)
    # A gate's gradient is taken in backward(), before anything is clipped.
    gates = scaled("taylor_fo_bn", unscale="before", clip=clip, count=1).compute()
    for name, value in scaled("taylor_fo_bn", count=1).compute().items():
        assert torch.equal(gates[name], value)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
@pytest.mark.parametrize("half", [False, True])
def test_a_pruner_takes_the_same_filters_wherever_gradients_are_clipped(criterion, half):
    """Each pruning is of one minibatch, of which clipping by the norm makes a multiple."""
    found = []
    for clipped in ("never", "before", "after"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=half)
        pruner = tk.Pruner(
            model, torch.zeros(1, 1, 8, 8), criterion, filters=0.5, every=1, per_step=2,
            momentum=0.0, optimizer=optimizer, scaler=scaler,
        )  # fmt: skip

        def clip(when, clipped=clipped, model=model, optimizer=optimizer, scaler=scaler):
            if clipped == when:
                scaler.unscale_(optimizer)
                assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 0.1

        for x, y in batches(7):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            clip("before")
            pruner.step()
            clip("after")
            scaler.step(optimizer)
            scaler.update()
        assert len(pruner.history) == 7
        found.append([record.removed for record in pruner.history])
    assert found[0] == found[1] == found[2]


def test_underflow_is_told_by_layer_and_goes_with_the_scale():
    shares = []
    for scale in (2.0**-22, 2.0**-8, 2.0**12):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        gradients(model, optimizer, torch.amp.GradScaler("cpu", init_scale=scale), batches(1)[0])
        shares.append(tk.gradient_underflow(model))
    assert shares[0].keys() == {"0", "3", "7"}
    assert all(share > 0.9 for share in shares[0].values())
    for name in shares[0]:
        assert shares[0][name] >= shares[1][name] >= shares[2][name]
    assert all(share < 0.01 for share in shares[2].values())


def test_what_is_off_is_no_underflow():
    model = network()
    with torch.no_grad():
        model[3].weight[:5] = 0
        model[4].weight[:5] = 0
        model[4].bias[:5] = 0
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad = None
    found = tk.gradient_underflow(model)
    assert found.keys() == {"3", "7"}
    assert max(found.values()) < 0.01
    model[7].weight.grad.zero_()
    assert tk.gradient_underflow(model, ["7"]) == {"7": 1.0}


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
def test_a_scaler_that_is_off_changes_nothing(criterion):
    model, wanted = network(), exact(criterion)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    imp = tk.Importance(model, criterion, scaler=scaler)
    for x, y in batches():
        model.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        imp.update()
    assert all(torch.equal(value, wanted[name]) for name, value in imp.compute().items())
    assert get_statistic(get_criterion(criterion).statistic).reads != "closure"


def test_wrong_use():
    model = network()
    with pytest.raises(TypeError, match=r"scaler: expected a torch\.amp\.GradScaler, got float"):
        tk.Importance(model, scaler=2.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    imp = tk.Importance(model, "taylor_fo", scaler=scaler)
    gradients(model, optimizer, scaler, batches(1)[0])
    with pytest.raises(ValueError, match="loss_scale: the scaler gives it"):
        imp.update(loss_scale=8.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"score between backward\(\) and scaler.step\(\)"):
        imp.update()
