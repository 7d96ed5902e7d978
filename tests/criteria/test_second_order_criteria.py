"""Criteria from Hessian-vector products, against the Hessian itself in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets
from tests.helpers.expansions import close, gate_expansion, scores, weight_expansion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_taylor_so_bn_takes_the_row_sums_of_the_hessian_of_all_gates(train):
    model, data = nets.mixed(train=train), nets.batch()
    # The Hessian moves running statistics, which a net in train mode does not read.
    slope, hessian = gate_expansion(model, nets.GATED, lambda: nets.loss_of(model, data))
    got = scores(model, "taylor_so_bn", lambda: nets.loss_of(model, data))
    close(got, (slope - hessian.sum(1) / 2).square())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_taylor_so_expands_the_loss_in_all_scored_weights(train):
    model, data = nets.mixed(train=train), nets.batch()
    names = ["stem", "up", "fc"]

    closure = partial(nets.loss_of, model, data)
    weights, slope, hessian, split = weight_expansion(model, names, closure)
    w = torch.cat([weight.flatten() for weight in weights])
    q = split(slope * w - w * (hessian @ w) / 2)
    close(
        scores(model, "taylor_so", closure, layers=names),
        torch.cat([part.square().sum(1) for part in q]),
    )
    joint = tk.Criterion("joint", "weight_products", lambda table: table[:, 0])
    close(scores(model, joint, closure, layers=names), torch.cat([part.sum(1) for part in q]))


def test_obd_hutchinson_probes_the_hessian_with_new_signs_at_every_update():
    model, data = nets.mixed(train=False), nets.batch()
    names = ["stem", "up", "fc"]

    closure = partial(nets.loss_of, model, data)
    weights, _, hessian, split = weight_expansion(model, names, closure)
    w = torch.cat([weight.flatten() for weight in weights])
    expected = torch.zeros(8 + 6 + 5, dtype=torch.float64)
    for number in range(3):
        z = torch.cat([part.flatten() for part in tk.rademacher_like(weights, seed=number)])
        probed = split(w.square() * z * (hessian @ z) / 2)
        expected += torch.cat([part.sum(1) for part in probed]) / 3
    close(scores(model, "obd_hutchinson", closure, updates=3, layers=names), expected)


def test_obd_hutchinson_is_exact_for_a_diagonal_hessian():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).double()
    curvature = torch.rand(4, 3, 1, 1, dtype=torch.float64)

    def closure() -> Tensor:
        model(torch.randn(2, 3, 5, 5, dtype=torch.float64))
        return (curvature * model[0].weight.square()).sum() / 2

    expected = (curvature * model[0].weight.detach().square()).flatten(1).sum(1) / 2
    close(scores(model, "obd_hutchinson", closure), expected)


def test_layers_that_share_a_weight_have_one_parameter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(5, 4, dtype=torch.float64)

    def closure() -> Tensor:
        return model(x).square().mean()

    _, slope, hessian, split = weight_expansion(model, ["0"], closure)
    w = model[0].weight.detach().flatten()
    (q,) = split(slope * w - w * (hessian @ w) / 2)
    close(scores(model, "taylor_so", closure), torch.cat([q.square().sum(1)] * 2))


def test_a_convolution_and_its_transpose_see_other_filters_in_one_weight():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 3, 2)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).sigmoid())

    model, x = Tied().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def closure() -> Tensor:
        return F.mse_loss(model(x), x)

    weights, slope, hessian, _ = weight_expansion(model, ["down"], closure)
    w = weights[0].flatten()
    q = (slope * w - w * (hessian @ w) / 2).view_as(weights[0]).square()
    close(
        scores(model, "taylor_so", closure),
        torch.cat([q.sum((1, 2, 3)), q.sum((0, 2, 3))]),
    )
    z = tk.rademacher_like(w.view_as(weights[0]), seed=0).flatten()
    h = (w.square() * z * (hessian @ z) / 2).view_as(weights[0])
    close(
        scores(model, "obd_hutchinson", closure),
        torch.cat([h.sum((1, 2, 3)), h.sum((0, 2, 3))]),
    )


CRITERIA = ["taylor_so", "taylor_so_bn", "taylor_so_diag", "obd_bn", "obd_fisher_mc"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_bfloat16_autocast(criterion):
    torch.manual_seed(0)
    model, (x, y) = nets.mixed(train=False).float(), nets.batch(16)
    x = x.float()

    def closure(enabled: bool) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return F.cross_entropy(model(x), y)

        return loss

    updates = 100 if criterion == "obd_fisher_mc" else 1  # the root of H turns with rounding
    exact, rounded = (scores(model, criterion, closure(b), updates=updates) for b in (False, True))
    for name, expected in exact.items():
        got = rounded[name]
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.15 * expected.norm(), name
