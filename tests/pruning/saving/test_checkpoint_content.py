"""What a checkpoint may hold: what torch.load reads back without running code, and nothing else."""

from __future__ import annotations

import os
import random
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from taylor_kernels.pruning import load_checkpoint, save_checkpoint
from tests.helpers import zoo
from tests.pruning.saving.test_resume import same, sgd, trained


def test_extras_that_can_be_read_back(tmp_path):
    model, optimizer = trained(steps=0)[:2]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    extra = {
        "ema": model.state_dict(),
        "scheduler": scheduler.state_dict(),
        "weight": nn.Parameter(torch.randn(3)),
        "seen": Counter("abca"),
        "order": OrderedDict(a=1),
    }
    save_checkpoint(os.fsencode(tmp_path / "c"), model=model, **extra)
    assert same(load_checkpoint(os.fsencode(tmp_path / "c"), model=model), extra)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    model, inputs = zoo.build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(1e-2), momentum=np.float32(0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float64(0.5) ** epoch)
    zoo.loss(model, inputs).backward()
    optimizer.step(), scheduler.step()
    extra = {"scheduler": scheduler.state_dict(), "best": {np.int64(3): (np.bool_(True), 1)}}
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, **extra)
    again = zoo.build("mlp")[0]
    other = torch.optim.SGD(again.parameters(), lr=0.5, momentum=0.9)
    loaded = load_checkpoint(tmp_path / "c", model=again, optimizer=other)
    assert loaded == extra
    assert same(other.state_dict(), optimizer.state_dict())
    assert type(other.param_groups[0]["lr"]) is float
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)  # what was saved is as it was


class Keeps(nn.Linear):
    def __init__(self, value):
        super().__init__(3, 2)
        self.value = value

    def get_extra_state(self):
        return {"it": self.value}

    def set_extra_state(self, state):
        self.value = state["it"]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "c"
    model = Keeps(np.float64(3))
    save_checkpoint(path, model=model)
    load_checkpoint(path, model=(again := Keeps(0)))
    assert again.value == 3
    old = path.read_bytes()
    model.value = np.zeros(3)
    with pytest.raises(TypeError, match=r"model: .*'_extra_state'\]\['it'\] is a numpy.ndarray"):
        save_checkpoint(path, model=model)
    optimizer = sgd(model)
    optimizer.param_groups[0]["rule"] = random.Random()
    with pytest.raises(TypeError, match=r"optimizer: .*\['rule'\] is a random.Random"):
        save_checkpoint(path, model=nn.Linear(3, 2), optimizer=optimizer)
    assert path.read_bytes() == old


def test_a_whole_file_with_objects_is_not_called_damaged(tmp_path):
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path / "c", model=model)
    content = torch.load(tmp_path / "c", weights_only=True)
    torch.save(content | {"extra": {"it": random.Random()}}, tmp_path / "c")
    with pytest.raises(ValueError, match=r"path: .* is whole, but holds objects .*random.Random"):
        load_checkpoint(tmp_path / "c", model=model)


def test_wrong_parts(tmp_path):
    model = trained(steps=0)[0]
    path = tmp_path / "c"
    save_checkpoint(path, model=model)
    for use in (save_checkpoint, load_checkpoint):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            use(path, model=3)
        with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer"):
            use(path, model=model, optimizer=3)
    with pytest.raises(FileNotFoundError, match=f"no folder '{tmp_path / 'no'}'$"):
        save_checkpoint(tmp_path / "no" / "c", model=model)
