"""What the scores are: coupled statistics summed first, then averaged as the paper does."""

from __future__ import annotations

import copy

import pytest
import torch

from taylor_kernels.criteria import Criterion, get_criterion
from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.scores.unit_scores import UnitScores
from taylor_kernels.statistics import get_statistic
from taylor_kernels.tracing import OUT, Slot
from tests.helpers import zoo
from tests.helpers.allocation import Largest


def batches(inputs, count):
    return [zoo.fresh(inputs) for _ in range(count)]


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_joint", "taylor_fo_bn", "snip"])
def test_average_over_minibatches_then_over_prunings(criterion):
    """Against the definition, on coupled layers, with no training in between."""
    torch.manual_seed(0)
    model, inputs = zoo.build("mobilenet", torch.float64)
    pruner = Pruner(model, inputs, criterion, filters=0.7, every=3, per_step=4, momentum=0.8)
    reference = get_criterion(criterion)
    layers = {name: model.get_submodule(name) for name in pruner.original_widths}
    kind = get_statistic(reference.statistic)
    # Of statistics at gates, a filter's row is that of its unit's one gate, behind the last norm.
    sites = find_gate_sites(pruner._network.channels, model, layers) if kind.at_gates else None
    statistic = kind(model, layers, None, sites) if kind.at_gates else kind(model, layers)
    names = list(layers)
    alive = {
        group.name: torch.ones(group.size, dtype=torch.bool) for group in pruner._network.groups
    }
    average = None
    while not pruner.done:
        period = []
        for batch in batches(inputs, 3):
            model.zero_grad()
            zoo.loss(model, batch).backward()
            tables = statistic.collect()
            rows = [
                [tables[names.index(slot.owner)][slot.index] for slot in group.producers]
                for group in pruner._network.groups
            ]
            units = [
                slots[0][:, 0] if kind.at_gates else sum(slot.sum(1) for slot in slots)
                for slots in rows
            ]
            period.append(reference.score(torch.cat(units)))
            record = pruner.step()
        mean = torch.stack(period).mean(0)
        average = mean if average is None else 0.8 * average + 0.2 * mean
        expected = dict(
            zip(alive, average.split([g.size for g in pruner._network.groups]), strict=True)
        )
        for group, dead in zip(pruner._network.groups, pruner._network.dead, strict=True):
            for slot in group.producers:
                got = pruner.scores()[slot.owner][slot.index][~dead]
                want = expected[group.name][~dead][:, None].expand_as(got)
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-12)
        # What went is the cheapest of what was left.
        left = torch.cat([expected[n][alive[n]] for n in alive])
        gone = torch.cat([
            expected[group.name][dead & alive[group.name]]
            for group, dead in zip(pruner._network.groups, pruner._network.dead, strict=True)
        ])  # fmt: skip
        assert torch.equal(gone.sort().values, left.sort().values[: gone.numel()])
        assert record.threshold == pytest.approx(gone.max().item(), rel=1e-5)
        for group, dead in zip(pruner._network.groups, pruner._network.dead, strict=True):
            alive[group.name] = ~dead
    statistic.close()


def test_lots_go_by_their_mean():
    torch.manual_seed(3)
    model, inputs = zoo.build("mlp")
    with torch.no_grad():
        for row, size in enumerate([20.0, 9, 9, 9, 5, 5, 5, 9, 9, 9]):
            model[0].weight[row] = size / 6
        for row, size in enumerate([3.0, 3, 3, 7, 7, 7, 8, 8, 8]):
            model[2].weight[row] = size / 10
    raw = Criterion("raw_l1", "magnitudes", lambda table: table[:, 0])
    pruner = Pruner(model, inputs, raw, filters=0.4, every=1, per_step=1, round_to=3)
    while not pruner.done:
        zoo.loss(model, inputs).backward()
        pruner.step()
    # Ten go down to nine by the cheapest one, at 5; then three at a time by their means: 3, then
    # (5 + 5 + 9) / 3, then 7. By their sums the one at 5 would go first.
    assert [record.removed for record in pruner.history] == [
        {"2": (0, 1, 2)}, {"0": (4,)}, {"0": (1, 5, 6)}, {"2": (3, 4, 5)}, {"0": (2, 3, 7)},
    ]  # fmt: skip


def test_per_example_scores_and_layers_with_other_batches():
    """taylor_fo_gate has a column per example; a layer may see more of them than another."""

    class Patches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 6), torch.nn.Linear(6, 7)
            self.c, self.d = torch.nn.Linear(7, 8), torch.nn.Linear(8, 2)

        def forward(self, x):
            y = torch.relu(self.b(torch.relu(self.a(x.reshape(-1, 3)))))
            return self.d(torch.relu(self.c(y.view(x.size(0), 4, -1).mean(1))))

    torch.manual_seed(0)
    model, inputs = Patches(), torch.randn(5, 12)
    pruner = Pruner(model, inputs, "taylor_fo_gate", params=0.5, every=2, per_step=3)
    while not pruner.done:
        zoo.loss(model, torch.randn(5, 12)).backward()
        pruner.step()
    assert set(pruner.widths) == {"a", "b", "c"}


class Residual(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inside = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.ReLU(), torch.nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return x + self.inside(x)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "obd_fisher"])
def test_a_minibatch_without_an_example_counts_as_zeros(criterion):
    """Of filters, and of blocks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), Residual(6), torch.nn.Linear(6, 2)).double()
    batch = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for sizes in ([5, 5], [5, 0], [0, 5]):
        blocks = criterion != "obd_fisher"
        made = copy.deepcopy(model)
        pruner = Pruner(made, batch, criterion, params=0.9, every=2, per_step=1, blocks=blocks)
        for size in sizes:
            made.zero_grad()
            made(batch[:size]).square().sum().backward()
            pruner.step()
        assert pruner.history
        found.append(pruner.scores())
        pruner.close()
    for scores in found[1:]:
        for name, expected in found[0].items():
            torch.testing.assert_close(scores[name], expected / 2, equal_nan=True)


def test_one_group_of_many_layers_does_not_widen_what_is_gathered_of_all():
    """Twenty layers make eight units of a stream, one has 4096 units of a filter each."""

    names = [f"stream.{i}" for i in range(20)]
    index = {name: torch.randperm(8)[:, None] for name in names}
    groups = [
        Group(tuple(Slot(name, OUT, index[name]) for name in names), (), torch.arange(8), ()),
        Group((Slot("wide", OUT, torch.arange(4096)[:, None]),), (), torch.arange(4096), ()),
    ]
    tables = [*(torch.randn(8, 401) for _ in names), torch.randn(4096, 401)]
    scores = UnitScores(get_criterion("obd_bn"), groups, [*names, "wide"])
    with Largest() as largest:
        scores.add(tables)
    assert largest.elements <= 1 << 24
    coupled = sum(table[index[name][:, 0]] for name, table in zip(names, tables[:-1], strict=True))
    slopes, signed = torch.cat((coupled, tables[-1]))[:, 1:].double().chunk(2, 1)
    expected = (slopes * signed).sum(1) / 2
    got = scores.close_period(0.9, [torch.zeros(group.size, dtype=torch.bool) for group in groups])
    # Products of either sign cancel: a bound on their rounding is a share of their magnitudes.
    scale = (slopes * signed).abs().sum(1)
    torch.testing.assert_close(torch.cat(got) / scale, expected / scale, rtol=0, atol=1e-5)


def test_loss_scale_is_divided_out():
    removed = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model, inputs = zoo.build("resnet")
        pruner = Pruner(model, inputs, "taylor_fo", params=0.6, every=2, per_step=0.1)
        while not pruner.done:
            model.zero_grad()
            (zoo.loss(model, zoo.fresh(inputs)) * scale).backward()
            pruner.step(loss_scale=scale)
        removed.append([record.removed for record in pruner.history])
        thresholds = [record.threshold for record in pruner.history]
    assert removed[0] == removed[1]
    assert max(thresholds) < 1


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "random"])
def test_training_is_undisturbed_until_something_goes(criterion):
    model, inputs = zoo.build("resnet")
    plain = copy.deepcopy(model)
    pruner = Pruner(model, inputs, criterion, params=0.5, every=100)
    states = []
    for net in (model, plain):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            zoo.loss(net, zoo.fresh(inputs)).backward()
            if net is model:
                pruner.step()
            optimizer.step()
        states.append((net.state_dict(), [p.grad for p in net.parameters()], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))
    assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())
    assert torch.equal(states[0][2], states[1][2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(value):
    model, inputs = zoo.build("vgg")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(
        model, inputs, "taylor_fo", params=0.5, every=2, per_step=0.2, optimizer=optimizer
    )

    def minibatch(broken):
        optimizer.zero_grad()
        zoo.loss(model, inputs).backward()
        if broken:
            model.features[4].weight.grad[3, 0, 0, 0] = value
        return pruner.step()

    assert minibatch(True) is None
    before = copy.deepcopy(dict(model.named_parameters()))
    cost = pruner.cost
    with pytest.raises(RuntimeError, match=r"features.4: 1 of 12 units have scores that are not"):
        minibatch(False)
    assert pruner.cost == cost
    assert not pruner.history
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model._forward_pre_hooks
    # The broken minibatch is forgotten.
    assert minibatch(False) is None
    assert minibatch(False).removed


def test_a_criterion_of_ones_own():
    mean_gradient = Criterion("mean_g2", "moments", lambda table: table[:, 4])
    model, inputs = zoo.build("densenet")
    pruner = Pruner(model, inputs, mean_gradient, params=0.7, every=1, per_step=0.2)
    while not pruner.done:
        zoo.loss(model, inputs).backward()
        pruner.step()
    assert pruner.history
