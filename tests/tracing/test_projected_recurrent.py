"""LSTMs that project their state: the projection can go, and the state stays wider than it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.tracing.removal import faults
from tests.zoo import judging


class Projected(nn.Module):
    """An LSTM with a projection between linear layers; others may make its first states."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.wide, self.told = draw.randint(6, 9), draw.random() < 0.5
        self.narrow = draw.randint(3, 5)
        layers, both = draw.choice([1, 2]), draw.random() < 0.5
        self.enter, count = nn.Linear(4, 6), layers * (1 + both)
        self.rnn = nn.LSTM(
            6, self.wide, layers, bias=draw.random() < 0.5, batch_first=True, bidirectional=both,
            proj_size=self.narrow,
        )  # fmt: skip
        if self.told:
            self.states = nn.ModuleList(nn.Linear(4, self.narrow) for _ in range(count))
            self.cells = nn.ModuleList(nn.Linear(4, self.wide) for _ in range(count))
        self.middle, self.last = nn.Linear(self.narrow * (1 + both), 5), nn.Linear(self.narrow, 2)
        self.leave = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = None
        if self.told:
            state = torch.stack([layer(x[:, 0]) for layer in self.states]).tanh()
            first = state, torch.stack([layer(x[:, 0]) for layer in self.cells])
        y, (state, _) = self.rnn(self.enter(x), first)
        return self.leave(self.middle(y).sigmoid()) + self.last(state[-1, :, None])


@pytest.mark.parametrize("seed", range(8))
def test_the_projection_goes_and_the_state_stays(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, x = Projected(draw), torch.randn(2, 3, 4)
    channels = trace(model, x)
    names = [name for name, _ in model.rnn.named_parameters() if name.startswith("weight")]
    stay = {f"rnn.{name}" for name in names if "_hr_" not in name}
    stay |= {name for name in (n for n, _ in model.named_modules()) if name.startswith("cells.")}
    assert set(channels.skipped) == stay | {"leave", "last"}
    assert {channels.skipped[name].partition(" (")[0] for name in stay} == {
        "has to stay wider than what it is projected to"
    }
    assert sorted(g.size for g in channels.groups) == sorted([model.narrow, 5, 6])
    assert not faults(model, x, channels)


def test_attributes_of_the_layer_follow():
    model = nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 9, 2, batch_first=True, proj_size=5))
    channels = trace(model, torch.randn(2, 3, 4))
    assert [group.size for group in channels.groups] == [6]  # the projection is returned
    model = Projected(random.Random(0))
    pruner = tk.Pruner(
        model, torch.randn(1, 3, 4), "magnitude_l2", filters=0.5, ignore=("middle",), every=1
    )
    while not pruner.done:
        pruner.step()
    pruner.compact()
    rnn = model.rnn
    assert rnn.proj_size == len(rnn.weight_hr_l0) < model.narrow
    assert rnn.hidden_size == rnn.weight_hr_l0.size(1) == model.wide
    assert rnn.input_size == rnn.weight_ih_l0.size(1) == model.enter.out_features


def test_a_pruner_trains_on_and_a_file_cuts_a_fresh_one(tmp_path):
    model, x = Projected(random.Random(1)), torch.randn(2, 3, 4)
    pruner, optimizer = judging.new_pruner(model, x, 0.7)
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
    judging.check_file(
        Projected(random.Random(2)), torch.randn(1, 3, 4), tmp_path / "pruned.safetensors"
    )
