"""A model that takes gradients inside of forward is refused by name, and its inner part is not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk


def by_grad(inner: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(inner(x).sum(), x, create_graph=True)[0]


def by_backward(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        inner(x).sum().backward()
        assert x.grad is not None
        return x.grad


def by_hand_in_eval_mode(inner: nn.Module, x: Tensor) -> Tensor:
    return by_grad(inner, x) * (1 if inner.training else 2)


class Force(nn.Module):
    def __init__(self, inner: nn.Module, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.inner, x)


@pytest.mark.parametrize("way", [by_grad, by_backward, by_hand_in_eval_mode])
def test_gradients_inside_of_forward(way):
    width = random.randint(6, 12)
    inner = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)).double()
    model, x = Force(inner, way), torch.randn(5, 4).double()
    for build in (tk.trace, lambda *given: tk.Pruner(*given, filters=0.5)):
        with pytest.raises(ValueError, match="takes gradients inside of forward"):
            build(model, x)
    # What it says to do instead is right.
    pruner = tk.Pruner(inner, x, "magnitude_l2", filters=0.5, every=1, per_step=0.2)
    while not pruner.done:
        pruner.step()
    masked = model(x).detach()
    pruner.compact()
    assert inner[0].out_features < width
    torch.testing.assert_close(model(x).detach(), masked, rtol=1e-11, atol=1e-12)


def test_a_wrong_example_is_told_as_such():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="example_inputs: the model does not run on them"):
        tk.trace(model, torch.randn(2, 5))
