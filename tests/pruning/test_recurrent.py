"""Hidden units of recurrent layers go from all gates, stacked layers and directions at once."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import taylor_kernels as tk
from taylor_kernels.pruning.proof.steady_noise import SteadyNoise
from tests.zoo import judging

KINDS = [nn.LSTM, nn.GRU, nn.RNN]


class Reader(nn.Module):
    """A recurrent layer between linear ones, over [N, T, C]."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, both: bool, hidden: int = 7) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.rnn = kind(6, hidden, layers, batch_first=True, bidirectional=both)
        self.leave = nn.Linear(hidden * (1 + both), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.rnn(self.enter(x))[0])


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_is_removed(kind, layers, both):
    model, x = Reader(kind, layers, both), torch.randn(2, 5, 4)
    pruner, optimizer = judging.new_pruner(model, x, 0.6)
    assert list(pruner.skipped) == ["leave"]
    assert pruner.whole.flops == 2 * 10 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
    hidden = model.rnn.hidden_size
    assert hidden < 7
    assert model.leave.in_features == hidden * (1 + both)
    assert pruner.cost.flops == 20 * sum(p.numel() for p in model.parameters() if p.dim() == 2)


class Told(Reader):
    """One whose first state another layer has made."""

    def __init__(self) -> None:
        super().__init__(nn.GRU, 1, False)
        self.tell = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.rnn(self.enter(x), self.tell(x[:, 0])[None].tanh())[0])


@pytest.mark.parametrize(
    "model",
    [*(Reader(k, n, True) for k in (nn.LSTM, nn.GRU) for n in (1, 2)), Told()],
    ids=["lstm", "two lstms", "gru", "two grus", "told"],
)
def test_gates_of_hidden_units_stand_wherever_they_are_read(model):
    """The slope in a factor on the columns of all weights that read them."""
    model, x = copy.deepcopy(model).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    gate = torch.ones(7, dtype=torch.float64, requires_grad=True)

    def read(name: str, parameter: Tensor) -> Tensor:
        if name == "leave.weight" or "_hh_" in name or "ih_l1" in name:
            wide = parameter.dim() > 1
            return parameter * gate.repeat(parameter.size(1) // 7) if wide else parameter
        return parameter

    gated = {name: read(name, parameter) for name, parameter in model.named_parameters()}
    (slopes,) = torch.autograd.grad(functional_call(model, gated, x).tanh().square().sum(), gate)
    pruner = tk.Pruner(model, x, params=0.97, every=1, ignore=["enter"])
    model(x).tanh().square().sum().backward()
    pruner.step()
    found = pruner.scores()
    names = {name for name in found if name.startswith("rnn.")}
    assert len(names) == 2 * len(model.rnn.all_weights)
    for name in names:
        times = model.get_parameter(name).size(0) // 7
        expected = slopes.square().float().repeat(times)
        expected = expected.where(~found[name].isnan(), torch.nan)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0, equal_nan=True)


def test_criteria_of_examples_keep_them_and_say_so():
    model, x = Reader(nn.LSTM, 1, False), torch.randn(2, 5, 4)
    pruner = tk.Pruner(model, x, "taylor_fo_gate", filters=0.9)
    assert set(pruner.widths) == {"enter"}
    assert "slope over a minibatch" in pruner.skipped["rnn.weight_hh_l0"]


def test_a_saved_file_cuts_a_fresh_network(tmp_path):
    draw = random.Random(0)
    model = Reader(draw.choice(KINDS), 2, True)
    judging.check_file(model, torch.randn(2, 5, 4), tmp_path / "pruned.safetensors")


@pytest.mark.parametrize("first", [torch.zeros, torch.randn])
def test_first_states_of_a_size_that_the_module_holds(first):
    class Begun(Reader):
        def forward(self, x: Tensor) -> Tensor:
            y, size = self.enter(x), (self.layers, len(x), self.hidden)
            return self.leave(self.rnn(y, (first(size).to(y), first(size).to(y)))[0])

    model, x = Begun(nn.LSTM, 2, False), torch.randn(2, 5, 4)
    model.layers, model.hidden = 2, 7
    pruner, _ = judging.new_pruner(model, x, 0.6, "magnitude_l2")
    assert list(pruner.skipped) == ["leave"]
    while not pruner.done:
        pruner.step()
    with SteadyNoise():
        before = model.eval()(x)
        torch.testing.assert_close(pruner.compact()(x), before)
    assert model.hidden == model.rnn.hidden_size < 7


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind):
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.cell, self.leave = nn.Linear(4, 6), kind(6, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in self.enter(x).unbind(1):
                state = self.cell(step, state)
            return self.leave(state if isinstance(state, Tensor) else state[0])

    model, x = Stepped(), torch.randn(2, 5, 4)
    judging.check_all_but(["leave"], model, x)
    assert model.cell.hidden_size < 7


def test_a_layer_run_twice_and_the_states_of_one_handed_to_another():
    """As of a translator: the hidden units of both are the same ones then."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = (
                nn.LSTM(4, 6, batch_first=True),
                nn.LSTM(4, 6, batch_first=True),
            )
            self.leave = nn.Linear(6, 2)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            _, state = self.encode(source)
            first, state = self.decode(target, state)
            return self.leave(first + self.decode(target.flip(1), state)[0])

    model, inputs = Translator(), (torch.randn(2, 5, 4), torch.randn(2, 3, 4))
    pruner, optimizer = judging.new_pruner(model, inputs, 0.6)
    assert list(pruner.skipped) == ["leave"]
    verdict = judging.prune(model, inputs, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
    assert model.encode.hidden_size == model.decode.hidden_size < 6


@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "taylor_fo_bn"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_gates_of_cells_stand_where_a_run_meets_them_or_nowhere(kind, criterion):
    """What a cell multiplies with inside is out of sight: it is known when the pruner is made."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.cell, self.leave = nn.Linear(4, 6), kind(6, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in self.enter(x).tanh().unbind(1):
                state = self.cell(step, state)
            return self.leave(state[0] if isinstance(state, tuple) else state)

    model, x = Cells().double(), torch.randn(5, 3, 4).double()
    pruner = tk.Pruner(model, x, criterion, filters=0.8, every=1, per_step=2)
    assert "enter" in pruner.widths
    for name in ("cell.weight_ih", "cell.weight_hh"):
        assert name in pruner.widths or "taylor_fo reads weights" in pruner.skipped[name]
    while not pruner.done:
        model(torch.randn_like(x)).square().sum().backward()
        pruner.step()
    masked = model.eval()(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=0, atol=1e-12)
