"""What tests of second-order criteria share: scores, and the loss's expansion in all gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets


def scores(
    model: nn.Module, criterion: str, loss: Callable[[], Tensor], *, updates: int = 1, **options
) -> dict[str, Tensor]:
    imp = tk.Importance(model, criterion, **options)
    for _ in range(updates):
        imp.update(closure=loss)
    result = imp.compute()
    imp.close()
    return result


def close(got: dict[str, Tensor], expected: Tensor, rtol: float = 1e-5) -> None:
    """All layers in one, relative to the greatest score."""
    flat = torch.cat(list(got.values())).double()
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(flat / scale, expected / scale, rtol=0, atol=rtol)


def deviation(imp: tk.Importance, expected: Tensor) -> Tensor:
    """How many standard errors the scores are away; some are hit exactly, as those of a filter
    that is off, whose score is 0 but for rounding."""
    got, error = (
        torch.cat(list(values.values())).double()
        for values in (imp.compute(), imp.standard_error())
    )
    assert error.max() > 0
    return (got - expected).abs() / (error + 1e-6 * expected.abs().max())


def gate_expansion(
    model: nn.Module, gated: dict[str, str], loss: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the loss in all gates."""
    sizes = [len(nets.filters_first(m, m.weight)) for m in map(model.get_submodule, gated)]
    ones = torch.ones(sum(sizes), dtype=torch.float64)

    def of_gates(gates: Tensor) -> Tensor:
        return nets.gated_loss(model, gated, gates, loss)

    return (
        torch.autograd.functional.jacobian(of_gates, ones),
        torch.autograd.functional.hessian(of_gates, ones),
    )


def weight_expansion(
    model: nn.Module, names: list[str], loss: Callable[[], Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, Callable[[Tensor], list[Tensor]]]:
    """Weights, gradient and Hessian of the loss in the weights of these layers, and how to split
    what has the length of all of them into [filters, rest] per layer."""
    layers = [model.get_submodule(name) for name in names]
    weights = [layer.weight for layer in layers]
    grads = torch.autograd.grad(loss(), weights, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in flat]
    hessian = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])

    def split(values: Tensor) -> list[Tensor]:
        parts = values.split([w.numel() for w in weights])
        return [
            nets.filters_first(layer, part.view_as(layer.weight))
            for layer, part in zip(layers, parts, strict=True)
        ]

    return [w.detach() for w in weights], flat.detach(), hessian, split
