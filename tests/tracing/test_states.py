"""First states of zeros that code makes: they are as wide as the states that follow them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.tracing import trace
from tests.tracing.removal import faults
from tests.zoo import judging


class Cell(nn.Module):
    """A recurrent cell of convolutions, as ConvLSTM and ConvGRU are."""

    def __init__(self, inputs: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.hidden, self.kind = hidden, kind
        gates = {"lstm": 4, "gru": 2, "plain": 1}[kind]
        self.gates = nn.Conv2d(inputs + hidden, gates * hidden, 3, padding=1)
        if kind == "gru":
            self.candidate = nn.Conv2d(inputs + hidden, hidden, 3, padding=1)

    def first(self, x: Tensor) -> list[Tensor]:
        state = torch.zeros(len(x), self.hidden, *x.shape[-2:], dtype=x.dtype)
        return [state] * (2 if self.kind == "lstm" else 1)

    def forward(self, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        h = state[0]
        gates = self.gates(torch.cat([x, h], 1))
        if self.kind == "plain":
            return [gates.tanh()]
        if self.kind == "lstm":
            i, f, o, g = gates.split(self.hidden, 1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            return [o.sigmoid() * c.tanh(), c]
        z, r = gates.sigmoid().chunk(2, 1)
        new = self.candidate(torch.cat([x, r * h], 1)).tanh()
        return [(1 - z) * h + z * new]


class Video(nn.Module):
    """Cells one after another over the frames of a video."""

    def __init__(self, widths: list[int], kind: str) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            Cell(inputs, hidden, kind) for inputs, hidden in zip([2, *widths], widths, strict=False)
        )
        self.leave = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = [cell.first(x[:, 0]) for cell in self.cells]
        for frame in x.unbind(1):
            for number, cell in enumerate(self.cells):
                states[number] = cell(frame, states[number])
                frame = states[number][0]
        return self.leave(frame)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("seed", range(3))
def test_states_of_convolutions_are_pruned(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    widths = [draw.randint(5, 9) for _ in range(draw.randint(1, 3))]
    model, x = Video(widths, kind), torch.randn(1, 3, 2, 4, 4)
    judging.check_all_but(["leave"], model, x)


class Recurrent(nn.Module):
    """The tutorial's: nothing but the first state says how wide states are."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.hidden_size, self.how = width, how
        self.read = nn.Linear(3, width)
        self.keep = nn.Linear(width if how == "own layer" else 3 + width, width)
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden_size)
        for step in x.unbind(1):
            if self.how == "own layer":
                h = (self.read(step) + self.keep(h)).tanh()
            else:
                parts = [step, h] if self.how == "behind the input" else [h, step]
                h = self.keep(torch.cat(parts, 1)).tanh() * self.read(step)
        return self.leave(h)


@pytest.mark.parametrize("how", ["own layer", "behind the input", "before the input"])
@pytest.mark.parametrize("width", [4, 7])
def test_an_attribute_that_sizes_the_first_state_follows(how, width):
    model, x = Recurrent(width, how), torch.randn(2, 3, 3)
    channels = trace(model, x)
    assert list(channels.skipped) == ["leave"]
    assert not faults(model, x, channels)
    dead = torch.arange(width) < 2
    assert channels.attributes([dead])[""] == {"hidden_size": width - 2}


def test_zeros_that_are_as_wide_as_a_number_in_the_code_keep_their_layer():
    """Removed, the number would be wrong: the proof says so."""
    model = Recurrent(6, "behind the input")
    model.hidden_size = torch.tensor(6)
    with pytest.raises(ValueError, match=r"read: the model does not run .* keep: the model does"):
        judging.new_pruner(model, torch.randn(1, 3, 3), 0.6)


class Decoder(nn.Module):
    """A recurrent network whose first states an encoder has made, and that attends to it.

    Args:
        act: what a state, and a key, is made by; zero at zero, or not.
    """

    def __init__(self, kind: type[nn.RNNBase], layers: int, act: nn.Module) -> None:
        super().__init__()
        self.hidden, self.layers, self.act = random.randint(4, 7), layers, act
        self.states = 2 if kind is nn.LSTM else 1
        self.encode = nn.Linear(5, 6)
        self.first = nn.ModuleList(nn.Linear(6, self.hidden) for _ in range(layers * self.states))
        self.cell = kind(3, self.hidden, layers, batch_first=True)
        self.key, self.leave = nn.Linear(6, self.hidden), nn.Linear(self.hidden + 6, 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encode(source)
        made = [self.act(layer(memory.mean(1))) for layer in self.first]
        states = [torch.stack(made[n :: self.states]) for n in range(self.states)]
        y, _ = self.cell(target, states[0] if self.states == 1 else tuple(states))
        weights = (y @ self.act(self.key(memory)).transpose(1, 2)).softmax(-1)
        return self.leave(torch.cat([y, weights @ memory], -1))


@pytest.mark.sample(6)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid()])
def test_what_makes_the_first_states_goes_with_them(act: nn.Module, kind, layers: int):
    """Where a masked state is not zero, attention to it says that its channels stay."""
    model = Decoder(kind, layers, act)
    inputs = (torch.randn(2, 4, 5), torch.randn(2, 3, 3))
    channels = trace(model, inputs)
    made = {f"first.{n}" for n in range(len(model.first))} | {"key"}
    assert made.isdisjoint(channels.skipped) == isinstance(act, nn.Tanh)
    assert not faults(model, inputs, channels)
