"""A tensor that no run has read keeps channels of its width only if another run may read it."""

from __future__ import annotations

import random
from collections.abc import Callable
from inspect import unwrap

import numpy as np
import pytest
import torch
from huggingface_hub import upload_folder
from torch import Tensor, nn

import taylor_kernels as tk
from tests.zoo import judging

#: Ask for a number that no run draws at either end.
ASKS: dict[str, Callable[[], bool]] = {
    "torch": lambda: bool(torch.randint(10**9, ()) == 7),
    "python": lambda: random.random() < 1e-9,
    "numpy": lambda: bool(np.random.rand() < 1e-9),
}


class Chancy(nn.Module):
    """A layer that chance puts another in the place of; says "a flag" whether it did."""

    def __init__(self, width: int, asks: Callable[[], bool], says: str) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.asks, self.says, self.other = asks, says, None

    def forward(self, y: Tensor) -> object:
        left_out = self.training and self.asks()
        y = self.other(y) if left_out and self.other is not None else self.layer(y)
        return (y, left_out) if self.says == "a flag" else y


class Stream(nn.Module):
    """A stream with a part along it that no run of the tests reads."""

    def __init__(self, asks: Callable[[], bool] = bool, says: str = "nothing") -> None:
        super().__init__()
        width = random.randint(5, 11)
        self.read = nn.Linear(3, width)
        self.chancy = Chancy(width, asks, says)
        self.extra = nn.Linear(width, width)
        self.shift = nn.Parameter(torch.randn(width))
        self.leave = nn.Linear(width, 2)

    def more(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        given = self.chancy(self.read(x))
        y, left_out = given if isinstance(given, tuple) else (given, False)
        return self.leave(self.more(self.read(x) if left_out else y))


class Speaking(Stream):
    """Code that the run has not gone through speaks of both."""

    mode = "usual"

    def more(self, y: Tensor) -> Tensor:
        return self.extra(y) + self.shift if self.mode == "other" else y


class ByName(Stream):
    def more(self, y: Tensor) -> Tensor:
        return y + sum(getattr(self, n) for n in self.names) if self.names else y

    names = ()


class OneByOne(Stream):
    def more(self, y: Tensor) -> Tensor:
        return y if len(self._modules) == 4 else sum(child(y) for child in self.children())


class Held(Stream):
    """A function that a module holds is called by it."""

    def __init__(self, *rest: object) -> None:
        super().__init__(*rest)
        self.how = [lambda y: self.extra(y) + self.shift]

    def more(self, y: Tensor) -> Tensor:
        return y if self.how else self.how[0](y)


def _helper(model: Stream, y: Tensor) -> Tensor:
    return model.extra(y) + model.shift


class Helped(Stream):
    def more(self, y: Tensor) -> Tensor:
        return y if self.training or not self.training else _helper(self, y)


def skipped(model: Stream) -> dict[str, str]:
    return tk.trace(model, torch.randn(4, 3)).skipped


class AtTheTop(nn.Module):
    """Draws in its own code."""

    def __init__(self, body: Stream, asks: Callable[[], bool]) -> None:
        super().__init__()
        self.body, self.asks = body, asks

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * 2 if self.training and self.asks() else x)


@pytest.mark.parametrize("asks", ASKS)
@pytest.mark.parametrize("kind", [Speaking, ByName, OneByOne, Held, Helped])
def test_what_code_may_reach_keeps_the_channels_of_its_width(kind, asks):
    found = skipped(AtTheTop(kind(), ASKS[asks]))
    assert "which no run has read" in found["body.read"]


@pytest.mark.parametrize("asks", ASKS)
def test_what_no_code_speaks_of_keeps_nothing(asks):
    assert set(skipped(AtTheTop(Stream(), ASKS[asks]))) == {"body.leave"}


@pytest.mark.parametrize("asks", ASKS)
@pytest.mark.parametrize("says", ["nothing", "a flag"])
def test_chance_in_a_module_decides_what_is_in_it_unless_it_says_so(says, asks):
    found = skipped(Speaking(ASKS[asks], says))
    assert ("read" in found) is (says == "a flag")


@pytest.mark.parametrize("asks", ASKS)
def test_a_name_of_another_module_counts(asks):
    """The layer that chance may lead to is another's too, under a name of its own."""
    model = Speaking(ASKS[asks])
    model.chancy.other = model.extra
    assert "read" in skipped(model)


def test_what_keeps_nothing_is_left_as_it_is_and_the_network_is_right():
    torch.manual_seed(random.randrange(1000))
    model, x = Speaking(ASKS["numpy"]), torch.randn(4, 3)
    with torch.no_grad():  # a channel that contributes nothing goes first
        model.read.weight[0], model.read.bias[0] = 0.0, 0.0
    before = model.extra.weight.shape
    pruner, optimizer = judging.new_pruner(model, x, 0.8)
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.error < 1e-12
    assert model.extra.weight.shape == before
    assert model.read.out_features < before[0]


class Sent(Stream):
    """Its code may send it to a hub, whose library speaks of `create_commit`."""

    def more(self, y: Tensor) -> Tensor:
        return upload_folder(y) if y is None else y


@pytest.mark.parametrize("asks", ASKS)
def test_libraries_that_know_no_model_speak_of_other_things(asks):
    model = Sent()
    model.create_commit = model.extra
    assert "create_commit" in unwrap(upload_folder.__func__).__code__.co_names
    assert set(skipped(AtTheTop(model, ASKS[asks]))) == {"body.leave"}
