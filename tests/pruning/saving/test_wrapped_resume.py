"""Runs with wrapped optimizers are resumed to the same bits; failed loads leave those alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from taylor_kernels.pruning.removing.optimizer_state import optimizers_in
from tests.helpers import zoo
from tests.pruning.removing.test_optimizers import (
    InObject,
    Nested,
    OwnGroups,
    Several,
    SharesGroups,
    two,
)
from tests.pruning.saving.test_resume import same


class Sam(SharesGroups):
    """As SAM is written most often: loading a state shares the groups anew."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base.param_groups = self.param_groups


def start(wrap):
    model, inputs = zoo.build("mlp")
    optimizer = two(model) if wrap is two else wrap(model.parameters(), SGD, lr=0.1, momentum=0.9)
    pruner = Pruner(
        model, inputs, "taylor_fo", filters=0.5, every=2, per_step=3, optimizer=optimizer
    )
    return model, optimizer, pruner, inputs


def go_on(model, optimizer, pruner, inputs, steps):
    torch.manual_seed(steps)
    for step in range(steps):
        model.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        for one in optimizer if isinstance(optimizer, tuple) else [optimizer]:
            one.step()
        if step == 3:
            pruner.compact()


@pytest.mark.parametrize("wrap", [SharesGroups, Sam, OwnGroups, Several, Nested, InObject, two])
def test_resumed_with_a_wrapped_optimizer_ends_at_the_same_bits(tmp_path, wrap):
    model, optimizer, pruner, inputs = start(wrap)
    go_on(model, optimizer, pruner, inputs, 6)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, pruner=pruner)
    again, other, its_pruner, _ = start(wrap)
    load_checkpoint(tmp_path / "c", model=again, optimizer=other, pruner=its_pruner)
    for parts in ((model, optimizer, pruner), (again, other, its_pruner)):
        for one in optimizers_in(parts[1]):
            one.param_groups[0]["lr"] = 0.03  # where groups are shared, they still are
        go_on(*parts, inputs, 7)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert pruner.history == its_pruner.history
    if wrap in (SharesGroups, Sam):
        assert other.param_groups is other.base.param_groups


def test_a_failed_load_leaves_a_wrapped_optimizer_as_it_was(tmp_path):
    model, optimizer, pruner, inputs = start(Sam)
    go_on(model, optimizer, pruner, inputs, 6)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, pruner=pruner)
    content = torch.load(tmp_path / "c", weights_only=True)
    content["optimizer"][1]["state"][0] = {"momentum_buffer": torch.ones(2, 2, 2, 2)}
    torch.save(content, tmp_path / "shape")
    content["optimizer"].pop()
    torch.save(content, tmp_path / "number")
    parts = start(Sam)
    go_on(*parts, 1)
    base = parts[1].base
    groups, state = base.param_groups, base.state
    before = copy.deepcopy([parts[0].state_dict(), parts[1].state_dict(), base.state_dict()])

    class Picky(SGD):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            raise RuntimeError("no")

    for name, kind, message in (
        ("shape", SGD, "has shape"), ("number", SGD, "states of 1 of them"), ("c", Picky, "no"),
    ):  # fmt: skip
        base.__class__ = kind
        with pytest.raises(ValueError, match=f"optimizer: .*{message}"):
            load_checkpoint(tmp_path / name, model=parts[0], optimizer=parts[1], pruner=parts[2])
        now = [parts[0].state_dict(), parts[1].state_dict(), base.state_dict()]
        assert same(now, before)
        assert base.param_groups is groups is parts[1].param_groups
        assert base.state is state
