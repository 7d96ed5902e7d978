"""Code that runs in train mode alone, without parameters of its own, is followed too."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import wraps

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing.run import training
from tests.zoo import judging

#: What is made of two streams [N, width] while training, and in eval mode.
OTHERWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "centred": lambda one, other: one - one.mean(-1, keepdim=True) + other,
    "normed": lambda one, other: nn.functional.normalize(one, dim=-1) + other,
    "softmax": lambda one, other: one.softmax(-1) + other,
    "flipped": lambda one, other: one.flip(-1) + other,
    "halves": lambda one, other: one * torch.cat(other.chunk(2, -1)[::-1], -1),
    "sorted": lambda one, other: one.sort(-1).values + other,
}


def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def around(*args: Tensor) -> Tensor:
        return forward(*args)

    return around


class Mix(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return OTHERWISE[self.kind](one, other) if self.training else one + other


class Decorated(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @decorated
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return OTHERWISE[self.kind](one, other) if self.training else one + other


class Otherwise(nn.Module):
    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        width = 2 * random.randint(3, 6)
        self.one, self.other = nn.Linear(3, width), nn.Linear(3, width)
        self.mix = mix
        self.leave = nn.Sequential(nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.mix(self.one(x).relu(), self.other(x).sigmoid()))


@pytest.mark.parametrize("mix", [Mix, Decorated])
@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_is_done_in_train_mode_alone_is_done_alike_after_removal(kind, mix):
    model = Otherwise(mix(kind))
    assert not tk.trace(model, torch.randn(4, 3)).unread
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = tk.Pruner(
        model, torch.randn(4, 3), "magnitude_l2", filters=0.6, every=1, per_step=2,
        optimizer=optimizer,
    )  # fmt: skip
    while not pruner.done:
        model(torch.randn(5, 3)).square().sum().backward()
        pruner.step()
    x = torch.randn(6, 3, dtype=torch.double)

    def trained() -> list[Tensor]:
        with torch.no_grad():
            return [copy.deepcopy(model).double().train()(x)]

    masked = trained()
    pruner.compact()
    assert judging.distance(masked, trained()) < 1e-12


class Pool(nn.Module):
    """A mean over channels, which comes in a tuple while training."""

    def forward(self, y: Tensor) -> Tensor | tuple[Tensor]:
        y = y - y.mean(-1, keepdim=True)
        return (y,) if self.training else y


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.pool, self.two = nn.Linear(3, 8), Pool(), nn.Linear(8, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.one(x))
        return self.leave(self.two(y[0] if isinstance(y, tuple) else y).relu())


def test_a_module_that_returns_a_tuple_in_train_mode_is_no_norm_there():
    skipped = tk.trace(Pooled(), torch.randn(4, 3)).skipped
    assert "mean in 'pool'" in skipped["one"]
    assert "two" not in skipped


class Dropping(nn.Module):
    """A branch that is left out of some examples, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(self.one(x), 0.3, self.training)
        branch = self.two(y).relu()
        if self.training:
            branch = branch.div(0.7) * (0.7 + torch.rand(len(x), 1)).floor_()
        return self.leave(y + branch)


def test_a_run_that_only_drops_is_not_traced_again(monkeypatch):
    monkeypatch.setattr(training, "_learn", lambda *_: pytest.fail("traced in train mode"))
    assert not tk.trace(Dropping(), torch.randn(4, 3)).skipped.keys() - {"leave"}
