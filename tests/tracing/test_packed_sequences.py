"""Recurrent layers on sequences of unlike lengths, packed one step of all after the other."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

from taylor_kernels.tracing import trace
from tests.tracing.removal import faults
from tests.zoo import judging


class Packed(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        kind = draw.choice([nn.LSTM, nn.GRU, nn.RNN])
        both = draw.random() < 0.5
        self.first, self.ordered = draw.random() < 0.5, draw.random() < 0.5
        self.last, self.padding = draw.random() < 0.5, draw.choice([0.0, 1.5])
        self.total = draw.choice([None, 9])
        self.enter = nn.Linear(4, 6)
        self.rnn = kind(6, 5, draw.choice([1, 2]), batch_first=self.first, bidirectional=both)
        self.middle = nn.Linear(10 if both else 5, 7)
        self.leave = nn.Linear(7, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.enter(x).sigmoid()
        if not self.first:
            y = y.transpose(0, 1)
        steps = pack_padded_sequence(y, lengths, self.first, enforce_sorted=self.ordered)
        out, state = self.rnn(steps)
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            y = torch.cat([state[-2], state[-1]], 1) if self.rnn.bidirectional else state[-1]
        else:
            y = pad_packed_sequence(out, self.first, self.padding, self.total)[0]
        return self.leave(self.middle(y).relu())


@pytest.mark.parametrize("seed", range(12))
def test_what_is_around_a_packed_recurrent_layer_goes(seed):
    draw = random.Random(seed)
    model, x = Packed(draw), torch.randn(3, 6, 4)
    lengths = torch.tensor([6, 3, 1] if model.ordered else draw.sample([6, 3, 1], 3))
    channels = trace(model, (x, lengths))
    assert list(channels.skipped) == ["leave"]
    assert sorted(group.size for group in channels.groups) == [5, 6, 7]
    assert not faults(model, (x, lengths), channels, draws=1)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_pruner_offers_it(ordered):
    draw = random.Random(1)
    model = Packed(draw)
    model.ordered = ordered
    inputs = torch.randn(3, 6, 4), torch.tensor([6, 3, 1])
    pruner, _ = judging.new_pruner(model, inputs, 0.7, "magnitude_l2")
    assert list(pruner.skipped) == ["leave"]
    while not pruner.done:
        pruner.step()
    model.eval()
    before = model(*inputs)
    torch.testing.assert_close(pruner.compact()(*inputs), before)


def test_a_list_of_sequences():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 6), nn.Linear(5, 2)
            self.rnn = nn.GRU(6, 5)

        def forward(self, *sequences: Tensor) -> list[Tensor]:
            steps = pack_sequence([self.enter(one) for one in sequences], enforce_sorted=False)
            return [self.leave(one) for one in unpack_sequence(self.rnn(steps)[0])]

    model, inputs = Listed(), (torch.randn(2, 4), torch.randn(5, 4), torch.randn(3, 4))
    channels = trace(model, inputs)
    assert list(channels.skipped) == ["leave"]
    assert not faults(model, inputs, channels)
