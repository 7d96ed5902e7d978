"""Scores of single parameters of a model, in float64."""

from __future__ import annotations

from torch import Tensor, nn


def places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    names = ("weight", "bias")
    return [(m, n) for n in names for m in model.children() if isinstance(getattr(m, n, 0), Tensor)]


def taylor(module: nn.Module, name: str) -> Tensor:
    """(g·w)² in float64."""
    parameter = dict(module.named_parameters()).get(f"{name}_orig", getattr(module, name))
    return (parameter.detach().double() * parameter.grad.double()).square()
