"""Steps that a scaled optimizer skips count in no score and no pruning; float32 copies follow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.mixed_precision import Scaling
from taylor_kernels.statistics import get_statistic
from tests.distributed.threads import ThreadRanks, in_threads
from tests.helpers.half_precision import batches, gradients, network

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(torch.optim.SGD):
    """Counts the steps that it makes."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def overflowing(step):
    """Minibatches whose gradients overflow, at first with the scale, later by themselves."""
    return step in (5, 6, 11)


@pytest.mark.parametrize(
    ("criterion", "then"),
    [
        ("taylor_fo_bn", ""),
        ("taylor_fo", ""),
        ("taylor_fo", "unscaled"),
        ("taylor_fo", "unscaled, clipped"),  # a norm that is inf makes numbers of what was inf
        ("taylor_fo_gate", "unscaled, clipped"),
        ("taylor_so_diag", ""),
    ],
)
def test_the_steps_that_the_optimizer_skips_are_skipped(criterion, then):
    model = network()
    optimizer = Counted(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too much for float16
    pruner = tk.Pruner(
        model, torch.zeros(1, 1, 8, 8), criterion, filters=0.5, every=4, per_step=2,
        optimizer=optimizer, scaler=scaler,
    )  # fmt: skip
    imp = tk.Importance(model, criterion, scaler=scaler)
    steps = 30
    for step, (x, y) in enumerate(batches(steps)):
        factor = math.inf if overflowing(step) else 1.0
        gradients(model, optimizer, scaler, (x * factor, y))
        if then:
            scaler.unscale_(optimizer)
        if "clipped" in then:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = optimizer.steps
        counted = imp.overflowed, pruner.overflowed

        def loss(x=x * factor, y=y):
            with torch.autocast("cpu", dtype=torch.float16):
                return F.cross_entropy(model(x), y)

        given = {"closure": loss} if imp.needs_closure else {}
        imp.update(**given)
        pruner.step(**given)
        scaler.step(optimizer)
        scaler.update()
        skipped = optimizer.steps == before
        assert (imp.overflowed - counted[0], pruner.overflowed - counted[1]) == (skipped, skipped)
        for norm in (model[1], model[4]):  # which an infinite input leaves without a value
            norm.running_mean.nan_to_num_(0.0, 0.0, 0.0)
            norm.running_var.nan_to_num_(1.0, 1.0, 1.0)
    assert pruner.overflowed == steps - optimizer.steps > 3
    assert pruner.history
    assert all(scores.isfinite().all() for scores in imp.compute().values())


@pytest.mark.parametrize("known", [True, False])
def test_an_optimizer_that_is_not_unscaled_is_looked_at_too(known):
    model = network()
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    first = torch.optim.SGD([model[0].weight], 0.0)
    second = torch.optim.SGD([model[7].weight, model.empty], 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaling = Scaling(scaler, model, [first, second] if known else ())
    weights, gates = (
        get_statistic(get_criterion(n).statistic) for n in ("taylor_fo", "taylor_fo_gate")
    )

    gradients(model, first, scaler, batches(1)[0])
    model.empty.grad = torch.empty(0)
    assert not scaling.skips()  # the empty one has no norm, and nothing that overflows
    assert scaling.of(weights, 1.0) == 2.0**12
    scaler.unscale_(first)
    assert not scaling.skips()
    assert scaling.of(gates, 1.0) == 2.0**12
    if known:  # the meter cannot know that there are others
        with pytest.raises(RuntimeError, match=r"scaler: it has unscaled .* call scaler.unscale_"):
            scaling.of(weights, 1.0)
    model[7].weight.grad[0, 0] = math.inf
    assert scaling.skips()
    scaler.unscale_(second)
    assert scaling.skips()
    assert scaling.of(weights, 1.0) == 1.0


@pytest.mark.parametrize("unscale", [False, True])
def test_another_optimizer_and_its_scaler_take_over(unscale):
    """As where a trainer makes both anew for a second training."""
    thresholds = []
    for scale in (1.0, 2.0**9):
        model, batch = network(), batches(1)[0]
        first, second = (torch.optim.SGD(model.parameters(), 0.0) for _ in range(2))
        pruner = tk.Pruner(
            model,
            batch[0][:1],
            "taylor_fo",
            filters=0.9,
            every=1,
            optimizer=first,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**4),
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        pruner.use_optimizer(second, scaler=scaler)
        scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
        if unscale:
            scaler.unscale_(second)
        thresholds.append(pruner.step().threshold)
    assert thresholds[0] == thresholds[1]
    with pytest.raises(TypeError, match="scaler: expected a"):
        pruner.use_optimizer(second, scaler=2.0**9)


def test_a_step_that_one_rank_skips_counts_on_none():
    def run(rank, size, meeting):
        model = network()
        ranks = ThreadRanks(meeting, rank)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        imp = tk.Importance(model, "taylor_fo_bn", ranks=ranks, scaler=scaler)
        for number, (x, y) in enumerate(batches()):
            gradients(model, optimizer, scaler, (x * math.inf if number == rank else x, y))
            imp.update()
        return imp.compute(), imp.dropped, imp.overflowed

    first, second = in_threads(2, run)
    assert (first[1:], second[1:]) == ((2, 1), (2, 1))
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())


def test_inside_scoring_the_tables_tell():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    imp = tk.Importance(model, "taylor_fo_gate", scaler=scaler)
    with tk.scoring(model):
        for factor in (1.0, math.inf, 1.0):
            x, y = batches(1)[0]
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x * factor), y)
            scaler.scale(loss).backward()
            imp.update()
    assert imp.overflowed == 1
    assert imp.state_dict()["updates"] == 2


class MasterSGD(torch.optim.Optimizer):
    """SGD on float32 copies of bfloat16 parameters, which it keeps in its state."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["master"] = p.detach().float()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p]["master"]
                if p.grad is not None:
                    master.sub_(group["lr"] * p.grad.float())
                p.copy_(master)


def test_float32_copies_in_the_optimizer_follow_masks_and_removal():
    model = network().bfloat16()
    optimizer = MasterSGD(model.parameters(), 0.01)
    pruner = tk.Pruner(
        model, torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), "taylor_fo", filters=0.5, every=2,
        per_step=4, optimizer=optimizer,
    )  # fmt: skip
    for x, y in batches(12):
        optimizer.zero_grad()
        F.cross_entropy(model(x.bfloat16()).float(), y).backward()
        pruner.step()
        optimizer.step()
        for parameter in model.parameters():
            master = optimizer.state[parameter]["master"]
            assert torch.equal(master.bfloat16(), parameter)
    assert pruner.done
    pruner.compact()
    for parameter in model.parameters():
        assert optimizer.state[parameter]["master"].shape == parameter.shape
    assert model[0].out_channels + model[3].out_channels == 14


def test_float32_copies_that_are_the_optimizers_own_parameters_are_told():
    """They are no parameters of the model, so that nothing could follow its masks."""
    model = network().bfloat16()
    copies = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer = torch.optim.SGD(copies, 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^optimizer: "):
        tk.Pruner(
            model, torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), filters=0.5, optimizer=optimizer
        )
    assert all(map(torch.equal, before, model.parameters()))
