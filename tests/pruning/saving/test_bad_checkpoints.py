"""Files and states that cannot be taken on are one clear error, and change nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from tests.helpers import zoo
from tests.pruning.saving.resumable import everything, go_on, same, trained


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


def test_missing_file(tmp_path):
    model, optimizer, pruner, _ = trained(steps=0)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "no", model=model, optimizer=optimizer, pruner=pruner)
