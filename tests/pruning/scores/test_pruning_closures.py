"""Pruning with criteria that run the model themselves."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.pruning import Pruner
from taylor_kernels.statistics import get_statistic
from tests.helpers import zoo

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSURES = [
    name
    for name in tk.criterion_names()
    if name != "oracle" and get_statistic(get_criterion(name).statistic).reads == "closure"
]


def step(pruner: Pruner, model: nn.Module, batch, **options):
    """What a training loop does: its own pass, then the pruner's."""
    model.zero_grad()
    zoo.loss(model, batch).backward()
    if pruner.needs_closure:
        options["closure"] = lambda: zoo.loss(model, batch)
    return pruner.step(**options)


@pytest.mark.sample
@pytest.mark.parametrize("criterion", [*CLOSURES, "obd_fisher"])
@pytest.mark.parametrize("kind", ["resnet", "mobilenet"])
def test_reaches_its_target_and_resumes_to_the_same_bits(kind, criterion):
    model, inputs = zoo.build(kind)
    twin = copy.deepcopy(model)
    batches = [zoo.fresh(inputs) for _ in range(40)]
    options = {"filters": 0.7, "every": 2, "per_step": 0.1}
    pruner = Pruner(model, inputs, criterion, **options)
    state = None
    for number, batch in enumerate(batches):
        step(pruner, model, batch)
        if number == 2:
            state = copy.deepcopy((pruner.state_dict(), model.state_dict()))
        if pruner.done:
            break
    assert pruner.done
    assert pruner.cost.filters <= 0.7 * pruner.whole.filters

    resumed = Pruner(twin, inputs, criterion, **options)
    resumed.load_state_dict(state[0])
    twin.load_state_dict(state[1])
    for batch in batches[3:]:
        if resumed.done:
            break
        step(resumed, twin, batch)
    assert [r.removed for r in resumed.history] == [r.removed for r in pruner.history]
    assert [r.threshold for r in resumed.history] == [r.threshold for r in pruner.history]
    zoo.loss(pruner.compact(), batches[0]).backward()


@pytest.mark.parametrize("criterion", [*CLOSURES, "obd_fisher"])
def test_tables_of_coupled_filters_add_up(criterion):
    model, inputs = zoo.build("resnet", torch.float64)
    model.eval()
    pruner = Pruner(model, inputs, criterion, filters=0.9, every=1, per_step=2)
    layers = {name: model.get_submodule(name) for name in pruner._prunable.scored}
    statistic = get_statistic(get_criterion(criterion).statistic)(model, layers)
    batch = zoo.fresh(inputs)
    zoo.loss(model, batch).backward()
    closure = (lambda: zoo.loss(model, batch)) if pruner.needs_closure else None
    tables = dict(zip(layers, statistic.collect(closure=closure), strict=True))
    groups = list(pruner._network.groups)
    expected = [
        get_criterion(criterion).score(
            sum(tables[slot.owner][slot.index].sum(1) for slot in group.producers)
        )
        for group in groups
    ]
    pruner.step(closure=closure)
    assert any(len(group.producers) > 1 for group in groups)
    for group, want, dead in zip(groups, expected, pruner._network.dead, strict=True):
        for slot in group.producers:
            got = pruner.scores()[slot.owner][slot.index][~dead].double()
            torch.testing.assert_close(
                got, want[~dead][:, None].double().expand_as(got), rtol=1e-4, atol=1e-12
            )


class Residual(nn.Module):
    """Three layers that make the channels of one residual stream, of ReLUs."""

    def __init__(self):
        super().__init__()
        self.stem, self.skip = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.first, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.norms[0](self.skip(x)) + self.norms[1](self.first(x))).relu()
        x = (x + self.norms[2](self.second(x))).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("criterion", ["obd_bn_exact", "taylor_so_diag_exact"])
def test_coupled_gates_have_the_gauss_newton_curvature_of_one_that_they_share(criterion):
    model = Residual().double().eval()
    for norm in model.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, y = torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.randint(0, 5, (7,))

    def outputs_of(gates):
        hooks = [
            norm.register_forward_hook(lambda *of: of[2] * gates[:, None, None])
            for norm in model.norms
        ]
        outputs = model(x)
        for hook in hooks:
            hook.remove()
        return outputs

    ones = torch.ones(8, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(outputs_of, ones)  # [N, K, 8]
    p = model(x).detach().softmax(1)
    hessian = (p.diag_embed() - p[:, :, None] * p[:, None, :]) / len(x)  # of the cross entropy
    bend = torch.einsum("nku,nkl,nlu->u", rows, hessian, rows)
    slope = torch.einsum("nku,nk->u", rows, (p - nn.functional.one_hot(y, 5)) / len(x))
    expected = bend / 2 if criterion == "obd_bn_exact" else (slope - bend / 2).square()
    pruner = Pruner(model, x, criterion, filters=0.9, every=1, per_step=1, ignore=("stem",))
    pruner.step(closure=lambda: nn.functional.cross_entropy(model(x), y))
    for layer in ("skip", "first", "second"):
        got = pruner.scores()[layer].double()
        assert got.isnan().sum() <= 1
        torch.testing.assert_close(got, torch.where(got.isnan(), got, expected), equal_nan=True)


def test_a_closure_is_given_where_it_is_needed_and_nowhere_else():
    model, inputs = zoo.build("mlp")
    closure = partial(zoo.loss, model, inputs)
    twin = copy.deepcopy(model)
    plain = Pruner(model, inputs, "taylor_fo", filters=0.8)
    own = Pruner(twin, inputs, "taylor_so_diag", filters=0.8)
    assert (plain.needs_closure, own.needs_closure) == (False, True)
    closure().backward()
    with pytest.raises(ValueError, match="closure: 'taylor_fo' takes none"):
        plain.step(closure=closure)
    with pytest.raises(ValueError, match=r"closure: 'taylor_so_diag' runs .*step\(closure="):
        own.step()
    plain.step()
    own.step(closure=partial(zoo.loss, twin, inputs))


def test_the_loss_of_a_closure_is_taken_as_it_is():
    found = []
    inputs = zoo.fresh(zoo.build("mlp")[1])
    for scale in (1.0, 1024.0):
        model = zoo.build("mlp")[0].eval()
        pruner = Pruner(model, inputs, "obd_bn", filters=0.95, every=1, per_step=1)
        pruner.step(closure=partial(zoo.loss, model, inputs), loss_scale=scale)
        pruner.close()
        found.append(pruner.history[0].threshold)
    assert found[0] == found[1] > 0
