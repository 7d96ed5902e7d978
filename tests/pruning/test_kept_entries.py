"""Masked entries that are left out of a write were as they had been left."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taylor_kernels as tk
from taylor_kernels.pruning.held_entries import HeldEntries

ROWS, COLUMNS = 75, 64  # more elements than are written anyway
Change = Callable[[nn.Module, int, int], None]


def held_weight() -> tuple[nn.Linear, dict]:
    rows, columns = torch.randperm(ROWS)[:9].sort().values, torch.randperm(COLUMNS)[:20]
    return nn.Linear(COLUMNS, ROWS), {"weight": [(0, rows, 0.0), (1, columns, 0.0)]}


def counted(model: nn.Module, row: int, column: int) -> None:
    with torch.no_grad():
        model.weight[row, column] += 1


def all_uncounted(model: nn.Module, row: int, column: int) -> None:
    model.weight.data.add_(torch.randn_like(model.weight))


def filters_uncounted(model: nn.Module, row: int, column: int) -> None:
    model.weight.data[:, column] = 1
    model.weight.data[row] = 1


def other_memory(model: nn.Module, row: int, column: int) -> None:
    model.weight.data = torch.randn_like(model.weight)


def other_order(model: nn.Module, row: int, column: int) -> None:
    model.weight.data = model.weight.data.t().contiguous().t()


def other_parameter(model: nn.Module, row: int, column: int) -> None:
    model.weight = nn.Parameter(torch.randn_like(model.weight))


def same_memory_turned(model: nn.Module, row: int, column: int) -> None:
    memory = model.weight.data
    model.weight.data = memory.as_strided(memory.shape, (1, memory.size(0)))


def inferred(model: nn.Module, row: int, column: int) -> None:
    with torch.inference_mode():
        model.weight[row, column] += 1


def nothing(model: nn.Module, row: int, column: int) -> None:
    pass


CHANGES = (
    counted, all_uncounted, filters_uncounted, other_memory, other_order, other_parameter,
    same_memory_turned, inferred, nothing,
)  # fmt: skip


@settings(max_examples=60)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(CHANGES), st.integers(0, ROWS - 1), st.integers(0, COLUMNS - 1)),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_changes_a_weight_is_undone(changes):
    model, masked = held_weight()
    held = HeldEntries(masked)
    held.write(model)
    for change, row, column in changes:
        change(model, row, column)
        expected = model.weight.detach().clone()
        for dim, index, value in masked["weight"]:
            expected.index_fill_(dim, index, value)
        held.write(model)
        assert torch.equal(model.weight, expected), change.__name__


def test_one_entry_that_nobody_counts_is_found_in_as_many_writes_as_there_are_rows():
    model, masked = held_weight()
    held = HeldEntries(masked)
    held.write(model)
    column = int(masked["weight"][1][1][0])
    model.weight.data[ROWS // 2, column] = 1
    for _ in range(ROWS):
        held.write(model)
    assert not model.weight[:, column].any()


def test_nothing_is_held_of_a_weight_that_is_gone():
    model, masked = held_weight()
    held = HeldEntries(masked)
    held.write(model)
    hook = held.zeroing()["weight"]
    model(torch.randn(2, COLUMNS)).sum().backward()
    hook(model.weight)
    held.begin_step(True)
    held.write(model, stepped=True)
    gone = []

    class Noted(nn.Parameter):
        def __del__(self):
            gone.append(True)

    model.weight = Noted(torch.randn(ROWS, COLUMNS))
    held.write(model)
    model.weight = nn.Parameter(torch.randn(ROWS, COLUMNS))
    held.begin_step(True)
    assert gone


KINDS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
}


class Run:
    """A network of large weights in training, a part of it masked."""

    def __init__(self, kind: str) -> None:
        layers = [nn.Linear(6, COLUMNS), nn.Sigmoid(), nn.Linear(COLUMNS, ROWS), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(ROWS, ROWS), nn.ReLU(), nn.Linear(ROWS, 3))
        self.optimizer = KINDS[kind](self.model.parameters())
        self.pruner = tk.Pruner(
            self.model, torch.randn(1, 6), "taylor_fo_gate", filters=0.1, every=2, per_step=0.1,
            optimizer=self.optimizer,
        )  # fmt: skip
        for _ in range(4):
            self.backward()
            self.pruner.step()
            self.optimizer.step()
        self.backward()
        self.pruner.step()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6)).square().mean().backward()

    def off(self) -> bool:
        """Whether all masked entries are zero."""
        network, tensors = self.pruner._network, dict(self.model.named_parameters())
        entries = network.channels.entries(network.dead)
        assert any(dim for cuts in entries.values() for dim in cuts)
        return not any(
            tensors[name].index_select(dim, index).any()
            for name, cuts in entries.items()
            for dim, index in cuts.items()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_steps_train_as_if_all_entries_were_written(kind, monkeypatch):
    trained = []
    seed = int(torch.randint(2**31, ()))
    for _ in range(2):
        torch.manual_seed(seed)
        run = Run(kind)
        for _ in range(3):
            run.backward()
            run.optimizer.step()
            assert run.off()
        trained.append([parameter.detach() for parameter in run.model.parameters()])
        monkeypatch.setattr(HeldEntries, "begin_step", lambda *_: None)  # of the second one
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def replaced_gradient(run: Run) -> None:
    weight = run.model[4].weight
    weight.grad = torch.randn_like(weight)


def gradient_of_one_row(run: Run) -> None:
    run.model[4].weight.grad[ROWS // 2] += 1


def noise_on_the_gradient(run: Run) -> None:
    grad = run.model[4].weight.grad
    grad.data.add_(torch.randn_like(grad))


def row_of_the_weight(run: Run) -> None:
    with torch.no_grad():
        run.model[4].weight[ROWS // 2] += 1


def loaded_state(run: Run) -> None:
    state = run.optimizer.state_dict()
    for own in state["state"].values():
        for key, value in own.items():
            if value is not None and value.dim():
                own[key] = torch.rand_like(value)
    run.optimizer.load_state_dict(state)


def hook_before(run: Run) -> None:
    run.optimizer.register_step_pre_hook(lambda *_: row_of_the_weight(run))


def hook_behind(run: Run) -> None:
    run.optimizer.register_step_post_hook(lambda *_: row_of_the_weight(run))


@pytest.mark.parametrize(
    "change",
    [
        replaced_gradient, gradient_of_one_row, noise_on_the_gradient, row_of_the_weight,
        loaded_state, hook_before, hook_behind,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_step_on_something_else_is_undone(kind, change):
    run = Run(kind)
    assert run.off()
    change(run)
    run.optimizer.step()
    assert run.off()


def test_what_a_closure_writes_is_undone():
    run = Run("SGD")

    def closure():
        run.backward()
        row_of_the_weight(run)
        return torch.zeros(())

    run.optimizer.step(closure)
    assert run.off()


def test_a_step_of_another_optimizer_on_the_same_weights_is_undone():
    run = Run("SGD")
    other = torch.optim.SGD(run.model.parameters(), 0.1)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    other.step()
    assert run.off()


@pytest.mark.parametrize("threaded", [False, True])
def test_steps_of_other_networks_say_nothing_of_this_one(threaded):
    """A weight is changed in one row before such a step, or behind one of another thread."""
    run, other = Run("SGD"), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other(torch.randn(3, 2)).sum().backward()
    if threaded:
        thread = Thread(target=optimizer.step)
        thread.start()
        thread.join()
    row_of_the_weight(run)
    if threaded:
        run.model(torch.randn(1, 6))
    else:
        optimizer.step()
    assert run.off()


def test_a_step_that_fails_says_nothing_of_later_ones():
    run = Run("SGD")
    run.model[4].weight.grad[ROWS // 2] += 1
    run.optimizer.param_groups[0]["lr"] = "none"
    with pytest.raises(TypeError):
        run.optimizer.step()
    run.optimizer.param_groups[0]["lr"] = 0.1
    row_of_the_weight(run)
    run.model(torch.randn(1, 6))
    assert run.off()
