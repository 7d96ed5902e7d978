"""A run that is killed and resumed ends where one that was not does; bad files change nothing."""

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
from tests.pruning import killable


def same(one, other):
    """Equal bits, all the way down."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def everything(model, optimizer, pruner):
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "pruner": copy.deepcopy(pruner.state_dict()),
    }


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
        "from tests.pruning.killable import run_until_killed\n"
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


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)


def trained(name="resnet", steps=11, importance="taylor_fo_bn", **options):
    torch.manual_seed(1)
    model, inputs = zoo.build(name)
    optimizer = sgd(model)
    settings = {"params": 0.4, "every": 3, "per_step": 0.1, "optimizer": optimizer} | options
    pruner = Pruner(model, inputs, importance, **settings)
    go_on(model, optimizer, pruner, inputs, steps)
    return model, optimizer, pruner, inputs


def go_on(model, optimizer, pruner, inputs, steps):
    for step in range(steps):
        optimizer.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        optimizer.step()
        if step == 6:
            pruner.compact()


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of one."""
    model, optimizer, pruner, _ = trained()
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    return path.read_bytes()


def flipped(data, start, stop):
    return data[:start] + bytes(byte ^ 4 for byte in data[start:stop]) + data[stop:]


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "flipped at the start": lambda data: flipped(data, 200, 600),
    "one bit in the middle": lambda data: flipped(data, len(data) // 2, len(data) // 2 + 1),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_file(tmp_path, checkpoint, how):
    path = tmp_path / "c.pt"
    path.write_bytes(DAMAGE[how](checkpoint))
    parts = trained(steps=0)[:3]
    before = everything(*parts)
    with pytest.raises(ValueError, match=r"path: .*damaged or not a checkpoint"):
        load_checkpoint(path, model=parts[0], optimizer=parts[1], pruner=parts[2])
    assert same(everything(*parts), before)


def foreign_file(path):
    torch.save({"weights": torch.zeros(3)}, path)


def newer_file(path):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"version": 99}, path)


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


WRONG = torch.ones(2, 2, 2, 2)
FOREIGN = {
    "another file": (foreign_file, {}, "was not written by save_checkpoint"),
    "newer": (newer_file, {}, "version 99"),
    "another criterion": (None, {"importance": "taylor_fo"}, "by 'taylor_fo_bn'.* by 'taylor_fo'"),
    "another model": (None, {"name": "mobilenet"}, "another model"),
    "other layers": (
        None, {"ignore": ["stem"]}, "other prunable layers .*release that found other groups",
    ),
    "broken mask": (
        lambda p: edit(p, lambda c: c["pruner"]["removed"].pop()), {}, "damaged.*'removed'",
    ),
    "wrong scores": (
        lambda p: edit(p, lambda c: c["pruner"]["scores"].update(average=torch.zeros(3))), {},
        "damaged.*average",
    ),
    "missing weight": (lambda p: edit(p, lambda c: c["model"].popitem()), {}, "model: .*differ"),
    "wrong shape": (
        lambda p: edit(p, lambda c: c["model"].update({"fc.weight": torch.zeros(2)})), {},
        "among them fc.weight",
    ),
    "other optimizer": (
        lambda p: edit(p, lambda c: c["optimizer"]["param_groups"][0]["params"].pop()), {},
        "optimizer: .*parameters in its groups",
    ),
    "no tensor": (
        lambda p: edit(p, lambda c: c["model"].update({"fc.bias": "x"})), {}, "among them fc.bias",
    ),
    "wrong record": (
        lambda p: edit(p, lambda c: c["pruner"]["history"][0].update(step="a")), {},
        "damaged.*'history'",
    ),
    "wrong filters": (
        lambda p: edit(p, lambda c: c["pruner"]["history"][0].update(removed={"fc": "a"})), {},
        "damaged.*'history'",
    ),
    "no optimizer state": (
        lambda p: edit(p, lambda c: c["optimizer"].pop("state")), {}, "optimizer: .*damaged",
    ),
    "no entry": (
        lambda p: edit(p, lambda c: c["optimizer"]["state"].update({0: None})), {},
        "optimizer: .*damaged",
    ),
    "entry of no parameter": (
        lambda p: edit(p, lambda c: c["optimizer"]["state"].update({999: {}})), {},
        "optimizer: .*damaged",
    ),
    "wrong momentum": (
        lambda p: edit(p, lambda c: c["optimizer"]["state"][0].update(momentum_buffer=WRONG)),
        {}, r"optimizer: .*damaged \('momentum_buffer' of parameter 0 has shape \(2, 2, 2, 2\)",
    ),
    "no optimizer": (lambda p: edit(p, lambda c: c.update(optimizer=None)), {}, "optimizer: one"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_file(tmp_path, checkpoint, case):
    path = tmp_path / "c.pt"
    path.write_bytes(checkpoint)
    change, options, message = FOREIGN[case]
    if change:
        change(path)
    parts = trained(steps=0, **options)[:3]
    before = everything(*parts)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, model=parts[0], optimizer=parts[1], pruner=parts[2])
    assert same(everything(*parts), before)


def adamw(steps):
    model, inputs = zoo.build("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = Pruner(model, inputs, params=0.5, every=2, optimizer=optimizer)
    go_on(model, optimizer, pruner, inputs, steps)
    return model, optimizer, pruner


@pytest.mark.parametrize("missing", ["betas", "step"])
def test_state_of_another_optimizer(tmp_path, missing):
    model, optimizer, pruner = adamw(3)
    path = tmp_path / "c.pt"
    save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    edit(path, lambda c: [g.pop(missing, None) for g in c["optimizer"]["param_groups"]])
    edit(path, lambda c: [s.pop(missing, None) for s in c["optimizer"]["state"].values()])
    parts = adamw(0)
    before = everything(*parts)
    with pytest.raises(ValueError, match=f"optimizer: .*AdamW.*{missing}"):
        load_checkpoint(path, model=parts[0], optimizer=parts[1], pruner=parts[2])
    assert same(everything(*parts), before)


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


@pytest.mark.parametrize("state", [None, 3, {}, {"format": "x"}, [1]])
def test_state_dict_of_something_else(state):
    _, _, pruner, _ = trained(steps=0)
    with pytest.raises(ValueError, match="state: it is not the state_dict"):
        pruner.load_state_dict(state)


@pytest.mark.parametrize("lacking", ["sum", "average", "count"])
def test_state_without_a_part_of_the_scores_changes_nothing(lacking):
    state = copy.deepcopy(trained(steps=3)[2].state_dict())
    del state["scores"][lacking]
    again, other, its_pruner, _ = trained(steps=0)
    before = everything(again, other, its_pruner)
    with pytest.raises(ValueError, match=r"state: it is damaged .*scores"):
        its_pruner.load_state_dict(state)
    assert same(everything(again, other, its_pruner), before)


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


def test_missing_file(tmp_path):
    model, optimizer, pruner, _ = trained(steps=0)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "no", model=model, optimizer=optimizer, pruner=pruner)
