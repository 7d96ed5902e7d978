"""The diagonal of the Gauss-Newton matrix, against whole Jacobians."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.parameter_fisher.ends import Ends
from taylor_kernels.parameter_fisher.own_passes import OwnPasses
from tests.helpers.parameter_loop import close
from tests.helpers.parameter_networks import N, images, network

pytestmark = pytest.mark.usefixtures("one_thread")


def exact_gauss_newton(model: nn.Module, x: Tensor, root) -> dict[str, Tensor]:
    """mean_n diag(J_nᵀ H_n J_n) by whole Jacobians; root(z): V with V Vᵀ = H."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for one in x.split(1):
        z = model(one)[0]
        for column in root(z.detach()).T:
            grads = torch.autograd.grad(z @ column, [*parameters.values()], retain_graph=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += grad.square() / len(x)
    return total


def softmax_root(z: Tensor) -> Tensor:
    p = z.softmax(0)
    values, vectors = torch.linalg.eigh(p.diag() - p[:, None] * p)
    return vectors * values.clamp(min=0).sqrt()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gauss_newton_matrix_of_cross_entropy(reduction):
    model, x, y = network(), images(), torch.randint(0, 3, (N,))
    meter = tk.ParameterFisher(model, matrix="gauss_newton", reduction=reduction)
    for part in (slice(0, 1), slice(1, N)):
        closure = lambda: F.cross_entropy(model(x[part]), y[part], reduction=reduction)  # noqa: B023, E731
        meter.update(closure=closure)
    close(meter.compute(), exact_gauss_newton(model, x, softmax_root))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z + z.new_tensor([5e3, 0, -5e3]), torch.zeros(N).long()),
        lambda z: F.cross_entropy(z, torch.full((N,), -100), reduction="sum"),
        lambda z: F.l1_loss(z, torch.full_like(z, 9)),
    ],
    ids=["saturated", "ignored", "straight"],
)
def test_a_batch_whose_loss_has_no_curvature_counts_as_zeros(loss):
    model, x, y = network(), images(), torch.randint(0, 3, (N,))
    meter = tk.ParameterFisher(model, matrix="gauss_newton")
    meter.update(closure=lambda: loss(model(x)))
    assert meter.examples == N
    assert not any(found.any() for found in meter.compute().values())
    meter.update(closure=lambda: F.cross_entropy(model(x), y))
    half = {n: found / 2 for n, found in exact_gauss_newton(model, x, softmax_root).items()}
    close(meter.compute(), half)


def test_its_estimate_by_probes_has_it_for_a_mean():
    model, x, y = network(), images(), torch.randint(0, 3, (N,))
    meter = tk.ParameterFisher(model, matrix="gauss_newton", samples=8)
    for _ in range(60):
        meter.update(closure=lambda: F.cross_entropy(model(x), y))
    expected = exact_gauss_newton(model, x, softmax_root)
    for name, found in meter.compute().items():
        assert (found - expected[name]).norm() < 0.2 * expected[name].norm(), name


def test_it_waits_for_the_other_kinds_too():
    """Modules run again, and modules called twice, in each of the backward passes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.act = nn.PReLU(4)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.inner(self.inner(x).sin())))

    model = Net().double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    meter = tk.ParameterFisher(model, matrix="gauss_newton", reduction="sum")
    with pytest.warns(UserWarning, match="act.weight"):
        meter.update(closure=lambda: F.mse_loss(model(x), y, reduction="sum"))
    identity = lambda z: 2**0.5 * torch.eye(3, dtype=z.dtype)  # noqa: E731
    close(meter.compute(), exact_gauss_newton(model, x, identity))


class Doubled(torch.autograd.Function):
    """2·x, whose backward pass looks at a number, which is not to be had of several at once."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return 2 * dy if dy.sum().item() < 1e30 else dy


class Mixed(nn.Module):
    """Known kinds, called twice too, and one that is run again; its outputs are 3 × 5."""

    def __init__(self, *, own_function: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.act = nn.PReLU(4)
        self.last = nn.LayerNorm(4)
        self.out = nn.Linear(4, 5)
        self.own_function = own_function

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids).transpose(1, 2))
        x = self.act(self.conv(self.conv(x).tanh()))
        x = self.last(x.transpose(1, 2))
        return self.out(Doubled.apply(x) if self.own_function else 2 * x)


@pytest.mark.filterwarnings("ignore:act.weight")
@pytest.mark.parametrize("own_function", [False, True])
@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("loss", ["cross_entropy", "both ways"])
def test_several_columns_at_once_are_what_they_are_one_by_one(
    loss, samples, own_function, monkeypatch
):
    model = Mixed(own_function=own_function).double().eval()
    ids, labels = torch.randint(0, 7, (N, 3)), torch.randint(0, 5, (N, 3))

    def closure() -> Tensor:
        z = model(ids)
        if loss == "cross_entropy":
            return F.cross_entropy(z.flatten(0, 1), labels.flatten())
        return (z.cos() + 0.1 * z.square()).sum()  # bent upwards and downwards

    found, flowed = [], []
    batched = OwnPasses._flow_together
    monkeypatch.setattr(
        OwnPasses,
        "_flow_together",
        lambda *arguments: flowed.append(batched(*arguments)) or flowed[-1],
    )
    for at_once in (1, 3, 100):
        monkeypatch.setattr(Ends, "passes_at_once", lambda *_, at_once=at_once: at_once)
        meter = tk.ParameterFisher(model, matrix="gauss_newton", samples=samples, seed=5)
        meter.update(closure=closure)
        found.append(meter.compute())
        meter.close()
    for other in found[1:]:
        for name, value in found[0].items():
            scale = value.abs().max()
            assert scale > 0, name
            assert (other[name] - value).abs().max() <= 1e-12 * scale, name
    assert flowed
    assert all(done != own_function for done in flowed)


def test_columns_flow_together_where_they_take_less_room_than_the_parameters():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(2, 64)
    meter = tk.ParameterFisher(model, matrix="gauss_newton", reduction="sum")
    counted = []
    meter._watch.reduce, reduce = lambda: counted.append(1) or reduce(), meter._watch.reduce
    meter.update(closure=lambda: model(x).square().sum())
    assert len(counted) <= 2  # of the eight columns, and at the end
    meter.close()
