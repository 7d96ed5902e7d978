"""What TKEF and TKGGN compute, by a loop over examples and by whole Jacobians, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.integrations.laplace import TKEF

N, C = 11, 4


def network(outputs: int = C, norm: bool = True) -> nn.Module:
    norms = [nn.BatchNorm2d(4)] if norm else []
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        *norms,
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.Tanh(),
        nn.Linear(6, outputs),
    ).double()
    model(images())  # running statistics
    return model.eval()


def images(n: int = N) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64)


def targets(likelihood: str, *shape: int) -> Tensor:
    if likelihood == "classification":
        return torch.randint(0, C, shape)
    return torch.randn(*shape, C, dtype=torch.float64)


def same(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


def loss_of(likelihood: str, f: Tensor, y: Tensor) -> Tensor:
    if likelihood == "regression":
        return F.mse_loss(f, y, reduction="sum")
    return F.cross_entropy(f.reshape(-1, f.size(-1)), y.reshape(-1), reduction="sum")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def by_loop(model: nn.Module, likelihood: str, ones: Iterator[tuple[object, Tensor]]) -> Tensor:
    """factor · Σ_n g_n², every example alone."""
    total = torch.zeros(())
    for x, y in ones:
        grads = torch.autograd.grad(
            loss_of(likelihood, model(x), y), trained(model), materialize_grads=True
        )
        total = total + torch.cat([g.flatten() for g in grads]).square()
    return total * (0.5 if likelihood == "regression" else 1)


def by_jacobians(model: nn.Module, likelihood: str, xs: Iterator[object]) -> Tensor:
    """Σ_n diag(J_nᵀ H_n J_n) by whole Jacobians and Hessians."""
    total = torch.zeros(())
    for x in xs:
        f = model(x)[0]
        J = torch.stack(
            [
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(
                            out, trained(model), retain_graph=True, materialize_grads=True
                        )
                    ]
                )
                for out in f.flatten()
            ]
        ).unflatten(0, (-1, f.size(-1)))
        if likelihood == "regression":
            total = total + J.square().sum((0, 1))
        else:
            p = f.detach().reshape(-1, f.size(-1)).softmax(1)
            H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            total = total + torch.einsum("tcp,tcd,tdp->p", J, H, J)
    return total


def reference(ours: type, model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> Tensor:
    if ours is TKEF:
        return by_loop(model, likelihood, zip(x.split(1), y.split(1), strict=True))
    return by_jacobians(model, likelihood, iter(x.split(1)))
