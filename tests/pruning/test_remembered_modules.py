"""Functions in a model that remember modules of it: copies have their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk


class Remembering(nn.Module):
    """A layer and its norm that run inside of a function."""

    def __init__(self, remember: Callable[[Remembering], None]) -> None:
        super().__init__()
        self.enter, self.inner = nn.Linear(5, 8), nn.Linear(8, 7)
        self.norm, self.leave = nn.BatchNorm1d(7), nn.Linear(7, 2)
        self.seen: dict[str, Tensor] = {}
        remember(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.act(self.enter(x).tanh()).tanh())


def by_self(model: Remembering) -> None:
    model.act = lambda x: model.norm(model.inner(x))


def by_modules(model: Remembering) -> None:
    layers = [model.inner, model.norm]

    def act(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    model.act = act


def by_default(model: Remembering) -> None:
    model.act = lambda x, inner=model.inner, norm=model.norm: norm(inner(x))


def by_each_other(model: Remembering) -> None:
    def act(x: Tensor, depth: int = 1) -> Tensor:
        return model.norm(model.inner(x)) if depth == 0 else act(x, depth - 1)

    model.act = act


def by_methods(model: Remembering) -> None:
    inner = model.inner.forward
    model.inner.forward = lambda x: inner(x) * 2
    model.act = lambda x: model.norm(model.inner(x))


def by_hook(model: Remembering) -> None:
    model.inner.register_forward_hook(lambda *run: model.seen.update(y=run[2]))
    model.act = lambda x: model.norm(model.inner(x) + model.seen["y"])


HOW = [by_self, by_modules, by_default, by_each_other, by_methods, by_hook]


@pytest.mark.parametrize("remember", HOW)
def test_layers_in_a_function_go_and_the_model_stays_as_it_was(remember):
    torch.manual_seed(0)
    model, x = Remembering(remember).double(), torch.randn(6, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = tk.Pruner(model, x, filters=0.5, every=1, per_step=3)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.seen
    assert pruner.widths == {"enter": 8, "inner": 7}
    while not pruner.done:
        model(x).square().sum().backward()
        pruner.step()
    masked = model.eval()(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=1e-11, atol=1e-12)
