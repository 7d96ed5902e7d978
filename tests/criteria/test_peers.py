"""The same numbers from other people's code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, (3, 2), padding=1, dilation=(1, 2)), nn.Sigmoid(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def linear_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.Tanh(), nn.Linear(16, 5))


NETS = {"conv": conv_net, "linear": linear_net}


def obd_fisher(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    imp = tk.Importance(model, "obd_fisher")
    with tk.scoring(model):
        F.cross_entropy(model(x), y).backward()
    imp.update()
    imp.close()
    return imp.compute()


def of_squares(model: nn.Module, mean_squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """½ Σ w² mean(g²) per filter, from a mean of squares in each weight's shape."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {
        name: (mean_squares[f"{name}.weight"] * layer.weight.detach().square()).flatten(1).sum(1)
        / 2
        for name, layer in layers.items()
    }


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(got[name].double(), want.double(), rtol=1e-4, atol=0)


@pytest.fixture(params=NETS)
def problem(request) -> tuple[nn.Module, Tensor, Tensor]:
    return NETS[request.param](), torch.randn(7, 3, 9, 9), torch.randint(0, 5, (7,))


def test_obd_fisher_is_that_of_torch_func(problem):
    model, x, y = problem
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of_one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, weights, (x[None],))
        return F.cross_entropy(out, y[None])

    each = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(weights, x, y)
    squares = {name: grads.square().mean(0) for name, grads in each.items()}
    close(obd_fisher(model, x, y), of_squares(model, squares))


@pytest.mark.filterwarnings("ignore")
def test_obd_fisher_is_that_of_backpack(problem):
    backpack = pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed")
    extensions = pytest.importorskip("backpack.extensions")
    model, x, y = problem
    expected_of = obd_fisher(model, x, y)
    model, loss_fn = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.SumGradSquared()):
        loss_fn(model(x), y).backward()
    # Gradients of a mean loss: N² Σ_n (g_n / N)² is the sum of squares, and / N their mean.
    squares = {name: len(x) * p.sum_grad_squared for name, p in model.named_parameters()}
    close(expected_of, of_squares(model, squares))
