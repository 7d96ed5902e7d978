"""What is read in train mode alone, or perhaps, is cut with its channels or keeps these."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.run import training
from taylor_kernels.tracing.run.recorder import Recorder
from tests.zoo import judging


class Centre(nn.Module):
    """A buffer of one row, as DINO's running centre."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.randn(1, width))

    def forward(self, y: Tensor) -> Tensor:
        return y - self.centre


class Shift(nn.Module):
    """What masked steps are set to, or another parameter along the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.shift


#: Makes a part that takes and gives [N, width].
PARTS: dict[str, Callable[[int], nn.Module]] = {
    "buffer": Centre,
    "parameter": Shift,
    "layer": lambda width: nn.Linear(width, width),
    "weight_norm": lambda width: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
    "batch norm": nn.BatchNorm1d,
    "norm": nn.LayerNorm,
}


class Trained(nn.Module):
    """A stream to which training adds a part, when `asks` says so."""

    def __init__(self, kind: str, asks: Callable[[], object], hidden: int = 5) -> None:
        super().__init__()
        width = random.randint(6, 11)
        self.asks = asks
        self.read = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.part = PARTS[kind](width)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(width, hidden), nn.ReLU())
        self.leave = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        if self.training and self.asks():
            y = y + self.part(y)
        return self.leave(self.body(y))


def pruned(model: Trained, example: Tensor, ratio: float = 0.6) -> tuple[tk.Pruner, float]:
    """Prune a model; how its outputs in train mode differ between masking and removal."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = tk.Pruner(
        model, example, "magnitude_l2", filters=ratio, every=1, per_step=2, optimizer=optimizer
    )
    x = torch.randn(6, 3, dtype=torch.double)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    while not pruner.done:
        model(x.float()).square().sum().backward()
        pruner.step()

    def trained() -> list[Tensor]:
        twin = copy.deepcopy(model).double().train()
        twin.asks = lambda: True
        with torch.no_grad():
            return [twin(x)]

    masked = trained()
    pruner.compact()
    return pruner, judging.distance(masked, trained())


@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("kind", PARTS)
def test_what_training_alone_reads_is_masked_and_removed_alike(kind, examples):
    """BatchNorm does not train on one example, and need not to be followed."""
    model = Trained(kind, lambda: True)
    wide = len(model.read[1].weight)
    pruner, error = pruned(model, torch.randn(examples, 3))
    assert error < 1e-12  # NaN is not
    assert "read.0" in pruner.widths
    assert model.read[0].out_features < wide


def with_torch() -> bool:
    return bool(torch.rand(()) < 0.3)


def with_torch_above() -> bool:
    return bool(torch.empty(3).uniform_(-1, 1)[0] > 0.8)


@pytest.mark.parametrize("asks", [with_torch, with_torch_above])
@pytest.mark.parametrize("kind", ["buffer", "parameter", "layer"])
def test_a_part_that_is_used_by_chance_is_followed_whatever_the_random_state(kind, asks):
    for seed in random.sample(range(1000), 3):
        torch.manual_seed(seed)
        pruner, error = pruned(Trained(kind, asks), torch.randn(4, 3))
        assert error < 1e-12
        assert "read.0" in pruner.widths


def with_python() -> bool:
    return random.random() < 1e-9


def with_numpy() -> bool:
    return bool(np.random.rand() < 1e-9)


def with_a_chosen_number() -> bool:
    return bool(torch.randint(10**9, ()) == 7)


def with_two_numbers() -> bool:
    return bool(torch.rand(()) < 0.5) and bool(torch.rand(()) > 0.5)


def without_targets() -> bool:
    raise ValueError("pass targets while training")


@pytest.mark.parametrize("kind", ["buffer", "parameter", "layer"])
@pytest.mark.parametrize(
    "asks", [with_python, with_numpy, with_a_chosen_number, with_two_numbers, without_targets]
)
def test_what_may_be_read_and_was_not_keeps_channels_of_its_width(kind, asks):
    model = Trained(kind, asks)
    model.eval()
    wide = len(model.read[1].weight)
    pruner, error = pruned(model, torch.randn(4, 3), 0.8)
    assert error < 1e-12
    assert "as wide as 'part." in pruner.skipped["read.0"]
    assert ("targets" in pruner.skipped["read.0"]) is (asks is without_targets)
    assert model.read[0].out_features == wide
    assert model.body[1].out_features < 5


@pytest.mark.parametrize("kind", PARTS)
def test_what_is_never_used_keeps_nothing(kind):
    """Dropout draws too, and no code asks for what it has drawn."""
    model = Trained(kind, lambda: False)
    model.read.append(nn.Dropout(0.3))
    channels = tk.trace(model, torch.randn(4, 3))
    assert "read.0" not in channels.skipped


def test_a_table_that_a_view_of_is_read_has_been_read():
    """As a table of positions is whose places are looked up in one row."""

    class Looking(Trained):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.places[self.table.view(-1)].sum()

    model = Looking("parameter", without_targets)
    model.part = nn.Identity()
    wide = len(model.read[1].weight)
    model.places = nn.Parameter(torch.randn(4))
    model.register_buffer("table", torch.randint(4, (wide, wide)))
    channels = tk.trace(model, torch.randn(4, 3))
    assert not channels.unread
    assert "read.0" not in channels.skipped


@pytest.mark.parametrize("error", [TimeoutError, MemoryError])
def test_a_run_in_train_mode_that_is_too_much_ends_no_trace(error):
    def too_much() -> bool:
        raise error("too much")

    channels = tk.trace(Trained("parameter", too_much), torch.randn(4, 3))
    assert "as wide as 'part.shift'" in channels.skipped["read.0"]
    assert "body.1" not in channels.skipped


def test_all_that_a_run_writes_down_is_learnt_but_what_is_of_eval_mode():
    """A field that a later version adds is not to be lost."""

    def recorder() -> Recorder:
        return Recorder({}, lambda tensor: None, 60.0)

    marks = [(1, "one", 0, 1), (2, "two", 0, 1)]  # as good as a tensor's first atom

    def write(record: Record, mark: tuple) -> None:
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, list):
                value.append(mark)
            elif isinstance(value, set):
                value.add(mark)
            elif isinstance(value, dict):
                value[mark] = mark

    def run(other: Recorder) -> list[Tensor]:
        write(other.record, marks[1])
        return []

    first = recorder()
    write(first.record, marks[0])
    training._learn(first, {}, run, recorder())
    for field in fields(Record):
        if isinstance(value := getattr(first.record, field.name), (list, set, dict)):
            assert sorted(value) == marks[: 1 if field.name in training.OF_EVAL_MODE else 2]
