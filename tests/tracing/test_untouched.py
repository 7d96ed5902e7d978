"""A trace leaves nothing behind that a model's code has changed while it ran."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk

#: What a model holds, how its code changes it, and what is to be compared.
HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Any]]] = {
    "list": (list, lambda v: v.append(1), list),
    "deque": (deque, lambda v: v.append(1), list),
    "set": (lambda: {0}, lambda v: v.add(1), set),
    "counter": (lambda: Counter("ab"), lambda v: v.update("a"), dict),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), list),
    "nested list": (lambda: {"a": ([],)}, lambda v: v["a"][0].append(1), copy.deepcopy),
    "nested table": (lambda: defaultdict(dict, a={}), lambda v: v["a"].update(b=1), copy.deepcopy),
    "object": (lambda: SimpleNamespace(n=0), lambda v: setattr(v, "n", v.n + 1), lambda v: v.n),
    "list of an object": (
        lambda: SimpleNamespace(log=[]),
        lambda v: v.log.append(1),
        lambda v: list(v.log),
    ),
    "torch's numbers": (
        lambda: torch.Generator().manual_seed(random.randrange(1000)),
        lambda v: torch.rand(1, generator=v),
        lambda v: v.get_state().tolist(),
    ),
    "NumPy's old numbers": (
        np.random.RandomState,
        lambda v: v.rand(),
        lambda v: v.get_state()[1:3][1],
    ),
    "NumPy's new numbers": (
        np.random.default_rng,
        lambda v: v.random(),
        lambda v: v.bit_generator.state,
    ),
    "Python's numbers": (random.Random, lambda v: v.random(), lambda v: v.getstate()),
    "Python's own numbers": (lambda: None, lambda _: random.random(), lambda _: random.getstate()),
    "NumPy's own numbers": (
        lambda: None,
        lambda _: np.random.rand(),
        lambda _: np.random.get_state()[2],
    ),
    "all in a list": (
        lambda: [random.Random()],
        lambda v: v[0].random(),
        lambda v: v[0].getstate(),
    ),
}


class Changing(nn.Module):
    """Changes what it holds in one mode, or in both; `late` is read in train mode alone."""

    def __init__(self, change: Callable[[Changing], object], held: Any, modes: set[bool]) -> None:
        super().__init__()
        self.change, self.held, self.modes = change, held, modes
        width = random.randint(4, 9)
        self.read, self.late = nn.Linear(3, width), nn.Linear(3, width)
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training in self.modes:
            self.change(self)
        y = self.read(x) + self.late(x) if self.training else self.read(x)
        return self.leave(y.relu())


@pytest.mark.parametrize("modes", [{True}, {False}, {True, False}], ids=str)
@pytest.mark.parametrize("kind", HELD)
def test_what_a_model_holds_is_as_it_was(kind, modes):
    make, change, read = HELD[kind]
    called: list[bool] = []

    def changing(model: Changing) -> None:
        called.append(model.training)
        change(model.held)

    model = Changing(changing, make(), modes).train(random.random() < 0.5)
    before = read(model.held)
    tk.trace(model, torch.randn(2, 3))
    assert set(called) == modes  # the functions that a module holds are not its state
    assert read(model.held) == before


@pytest.mark.parametrize("modes", [{True}, {False}, {True, False}], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_parameters_that_get_other_data_have_their_own_again(modes, shared):
    """A momentum encoder gives its parameters new memory, and no operation writes into them."""
    torch.manual_seed(random.randrange(1000))

    def follow(model: Changing) -> None:
        for mine, other in zip(model.late.parameters(), model.read.parameters(), strict=True):
            mine.data = mine.data * 0.9 + other.data * 0.1
            mine.data.add_(1)

    model = Changing(follow, None, modes)
    if shared:  # parts of one memory, as sharded models have them
        flat = torch.randn(sum(p.numel() for p in model.late.parameters()))
        sizes = [p.numel() for p in model.late.parameters()]
        for mine, part in zip(model.late.parameters(), flat.split(sizes), strict=True):
            mine.data = part.view_as(mine)
    memory = [p.data_ptr() for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    tk.trace(model, torch.randn(2, 3))
    assert memory == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_parts_of_one_memory_are_written_back():
    flat = torch.randn(20)
    model = Changing(lambda model: model.late.bias.add_(1), None, {True, False})
    for mine, begin in ((model.read.bias, 0), (model.late.bias, 10)):
        mine.data = flat[begin : begin + mine.numel()]
    before = copy.deepcopy(model.state_dict())
    tk.trace(model, torch.randn(2, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Freezing(nn.Linear):
    """Its weight learns in one of the two modes only."""

    def __init__(self, learns_in: bool) -> None:
        super().__init__(5, 4)
        self.learns_in = learns_in
        self.train()

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        self.weight.requires_grad_(mode is self.__dict__.get("learns_in", mode))
        return self


@pytest.mark.parametrize("learns_in", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_what_learns_learns_and_what_is_frozen_is(learns_in, learns):
    model = nn.Sequential(nn.Linear(3, 5), Freezing(learns_in), nn.Linear(4, 2))
    model[1].weight.requires_grad_(learns)
    tk.trace(model, torch.randn(2, 3))
    assert model[1].weight.requires_grad is learns


class OwnNorm(nn.Module):
    """It learns its statistics by a function whose schema does not say that it writes."""

    def __init__(self, width: int, per_example: bool) -> None:
        super().__init__()
        self.per_example = per_example
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        norm = functional.instance_norm if self.per_example else functional.batch_norm
        return norm(x, self.mean, self.var, None, None, self.training)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_a_function_learns_are_as_they_were(per_example, training):
    width = random.randint(3, 8)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), OwnNorm(width, per_example), nn.Conv2d(width, 2, 1)
    )
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(1, 3, 6, 6)
    tk.trace(model, x)
    tk.Pruner(model, x, "magnitude_l2", filters=0.9).close()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
