"""Recurrent layers and cells whose weights a parametrization works out."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.tracing.removal import faults
from tests.zoo import judging

LAYERS = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]


class Reader(nn.Module):
    """A recurrent layer, or a cell over the steps, between linear layers."""

    def __init__(self, kind: type[nn.Module], draw: random.Random) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        more = {}
        if kind in LAYERS:
            more = {"num_layers": draw.choice([1, 2]), "bidirectional": draw.random() < 0.5}
            more["batch_first"] = True
        self.both = more.get("bidirectional", False)
        self.rnn = kind(6, 7, bias=draw.random() < 0.5, **more)
        self.leave = nn.Linear(7 * (1 + self.both), 3)
        self.weights = [n for n, p in self.rnn.named_parameters() if p.dim() == 2]

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        if isinstance(self.rnn, nn.RNNBase):
            return self.leave(self.rnn(y)[0])
        state, found = None, []
        for step in y.unbind(1):
            state = self.rnn(step, state)
            found.append(self.leave(state[0] if isinstance(state, tuple) else state))
        return torch.stack(found, 1)


def normed(kind: type[nn.Module], draw: random.Random) -> Reader:
    """Some of its weights are normalised, one at least.

    A singular value is read along vectors that are kept, so that it is the same without zeros.
    """
    model = Reader(kind, draw)
    for name in draw.sample(model.weights, draw.randint(1, len(model.weights))):
        draw.choice([weight_norm, spectral_norm])(model.rnn, name)
    return model


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("seed", range(2))
def test_units_of_cells_go(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    model, x = normed(kind, draw), torch.randn(2, 3, 4)
    channels = trace(model, x)
    assert list(channels.skipped) == ["leave"]
    assert sorted(group.size for group in channels.groups) == [6, 7]
    assert not faults(model, x, channels, draws=2)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_pruner_of_one_that_has_run(kind):
    """PyTorch cannot copy a layer that holds weights with a graph, as such a one does then."""
    model, x = normed(kind, random.Random()).double(), torch.randn(2, 3, 4).double()
    model(x).sum().backward()
    pruner, optimizer = judging.new_pruner(model, x, 0.6)
    assert list(pruner.skipped) == ["leave"]
    while not pruner.done:
        optimizer.zero_grad()
        model(torch.randn_like(x)).square().sum().backward()
        pruner.step()
        optimizer.step()
    model.eval()
    other = torch.randn_like(x)
    before = model(other)
    torch.testing.assert_close(pruner.compact()(other), before, rtol=0, atol=1e-12)
    assert model.rnn.hidden_size == model.leave.in_features // (1 + model.both) < 7
    assert model.rnn.input_size == model.enter.out_features
    model.train()(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", LAYERS)
def test_criteria_of_gates_keep_them_and_say_so(kind):
    """A gate is read off the gradient of a weight, which one that is worked out does not keep."""
    model = normed(kind, random.Random(0))
    pruner = tk.Pruner(model, torch.randn(2, 3, 4), "taylor_fo_bn", filters=0.9)
    assert set(pruner.widths) == {"enter"}
    reasons = [why for name, why in pruner.skipped.items() if name.startswith("rnn.")]
    assert reasons
    assert all("taylor_fo reads weights alone" in why for why in reasons)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_spectral_norm_takes_as_many_steps_behind_a_removal(kind, name):
    """It takes one whenever a layer asks for its weight in train mode."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), kind(6, 7)).double(), torch.randn(5, 2, 4).double()
    spectral_norm(model[1], name, n_power_iterations=1)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.leave = model, nn.Linear(7, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.body(x)[0])

    whole = Last()
    pruner = tk.Pruner(whole, x, "magnitude_l2", filters=0.7, every=1, per_step=2)
    while not pruner.done:
        whole(x).sum().backward()
        pruner.step()
    kept = {n: b.clone() for n, b in whole.named_buffers()}
    masked = [whole(x) for _ in range(2)]
    for n, buffer in whole.named_buffers():
        buffer.copy_(kept[n])
    pruner.compact()
    for expected in masked:
        torch.testing.assert_close(whole(x), expected, rtol=0, atol=1e-12)
