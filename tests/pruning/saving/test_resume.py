"""A run that is killed and resumed ends where one that was not does."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from tests.helpers import zoo
from tests.helpers.programs import run_program
from tests.helpers.samples import some
from tests.pruning.saving import killable
from tests.pruning.saving.resumable import everything, go_on, same, sgd, trained


@pytest.mark.parametrize(
    ("name", "criterion"),
    some([("resnet", "taylor_fo_bn"), ("mobilenet", "taylor_fo_gate")], 1),
)
def test_killed_and_resumed_is_never_killed(tmp_path, name, criterion):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    expected = everything(*killable.run(whole, name, criterion))

    program = (
        "from tests.pruning.saving.killable import run_until_killed\n"
        f"run_until_killed({str(broken)!r}, {name!r}, {criterion!r})"
    )
    kills = 0
    for _ in range(3):
        done = run_program(program, optimizers=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
    assert kills
    got = everything(*killable.run(broken, name, criterion))
    assert same(got, expected)
    assert len(expected["pruner"]["history"]) > 2


@pytest.mark.parametrize("steps", [0, 2, 4, 8, 11])
def test_state_is_plain_and_complete(tmp_path, steps):
    model, optimizer, pruner, inputs = trained(steps=steps)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, pruner=pruner, note=["a", 1])
    again, optim, other, _ = trained(steps=0)
    extra = load_checkpoint(tmp_path / "c", model=again, optimizer=optim, pruner=other)
    assert extra == {"note": ["a", 1]}
    assert same(everything(again, optim, other), everything(model, optimizer, pruner))
    assert other.cost == pruner.cost
    assert other.history == pruner.history
    assert other.done == pruner.done
    ends = []
    for parts in ((model, optimizer, pruner), (again, optim, other)):
        torch.manual_seed(8)
        go_on(*parts, inputs, 9)
        ends.append(everything(*parts))
    assert same(*ends)


def test_going_back_in_the_same_process():
    model, optimizer, pruner, inputs = trained(steps=4)
    then = everything(model, optimizer, pruner)
    cost = pruner.cost
    for _ in range(5):
        optimizer.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        optimizer.step()
    assert pruner.cost != cost
    pruner.load_state_dict(then["pruner"])
    model.load_state_dict(then["model"])
    optimizer.load_state_dict(then["optimizer"])
    assert pruner.cost == cost
    assert same(everything(model, optimizer, pruner), then)
    # Once they are really gone, there is no way back.
    go_on(model, optimizer, pruner, inputs, 7)
    now = everything(model, optimizer, pruner)
    with pytest.raises(ValueError, match="have been removed from this model"):
        pruner.load_state_dict(then["pruner"])
    assert same(everything(model, optimizer, pruner), now)


def test_optimizer_that_the_pruner_does_not_know(tmp_path):
    model, optimizer, pruner, _ = trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, pruner=pruner)
    again, _, blind, inputs = trained(steps=0, optimizer=None)
    third = copy.deepcopy(again)
    for other in (blind, Pruner(third, inputs, params=0.4, optimizer=sgd(third))):
        again = other.model
        stranger = sgd(again)
        before = everything(again, stranger, other)
        with pytest.raises(ValueError, match="optimizer: the pruner has another one or none"):
            load_checkpoint(tmp_path / "c", model=again, optimizer=stranger, pruner=other)
        assert same(everything(again, stranger, other), before)


def test_compact_warns_of_optimizers_it_does_not_know():
    for known in (False, True):
        model, inputs = zoo.build("mlp")
        optimizer = sgd(model) if known else None
        pruner = Pruner(model, inputs, params=0.5, every=1, optimizer=optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.compact()  # nothing has gone yet
            assert not caught
            zoo.loss(model, inputs).backward()
            pruner.step()
            pruner.compact()
        assert sum("an optimizer made before" in str(w.message) for w in caught) == (not known)


def test_state_of_a_pruner_that_pruned_less_often():
    state = trained(steps=4, every=5)[2].state_dict()
    model, optimizer, pruner, inputs = trained(steps=0, every=3)
    pruner.load_state_dict(state)
    go_on(model, optimizer, pruner, inputs, 1)
    assert len(pruner.history) == 1


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, optimizer, pruner, _ = trained(steps=0)
    path = tmp_path / "c.pt"
    save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    old = path.read_bytes()
    with pytest.raises(TypeError, match=r"scheduler: expected tensors and plain Python.*object"):
        save_checkpoint(path, model=model, scheduler={"it": object()})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner, step=1)
    assert path.read_bytes() == old
    assert [p.name for p in Path(tmp_path).iterdir()] == ["c.pt"]
