"""Layers whose weight is computed: asked about without being computed, and copied."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

import taylor_kernels as tk


def network(first):
    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).train()


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_gate", "magnitude_l2", "random"])
def test_a_spectral_norm_takes_no_step_but_those_of_the_models_own_passes(criterion):
    model = network(spectral_norm(nn.Linear(4, 8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = tk.Pruner(model, torch.randn(2, 4), criterion, filters=0.8, every=2, per_step=1)
    meter = tk.Importance(model, "magnitude_l2")
    meter.update()
    after = model.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    meter.close()
    pruner.close()


def test_the_old_weight_norm_prunes_by_its_gates():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has deprecated it
        model = network(nn.utils.weight_norm(nn.Linear(4, 8)))
    x = torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()  # leaves a weight that has a graph
    pruner = tk.Pruner(
        model, x, "taylor_fo_gate", filters=0.5, every=1, per_step=2, optimizer=optimizer
    )
    while not pruner.done:
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        pruner.step()
        optimizer.step()
    masked = model(x).detach()
    pruner.compact()
    torch.testing.assert_close(model(x).detach(), masked)
    assert pruner.widths["0"] == len(model[0].weight_v)


class LowRank(nn.Linear):
    """A linear layer with a low-rank update, part of its weight or beside it."""

    def __init__(self, inputs: int, outputs: int, how: str):
        super().__init__(inputs, outputs)
        self.how = how
        self.down = nn.Parameter(torch.randn(3, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 3))

    def forward(self, x):
        if self.how == "merged":
            return functional.linear(x, self.weight + self.up @ self.down / 3, self.bias)
        return x @ self.down.T @ self.up.T + functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
@pytest.mark.parametrize("how", ["merged", "beside"])
def test_a_low_rank_update_is_no_other_weight_of_its_layer(how, criterion):
    """The layer is as wide as its own weight, whichever product runs first."""
    widths = torch.randint(7, 12, (2,)).tolist()
    model = nn.Sequential(
        LowRank(4, widths[0], how), nn.ReLU(), LowRank(*widths, how), nn.ReLU(),
        nn.Linear(widths[1], 2),
    )  # fmt: skip
    x = torch.randn(5, 4)
    pruner = tk.Pruner(model, x, criterion, filters=0.6, every=1, per_step=2)
    assert [pruner.widths[name] for name in ("0", "2")] == widths
    while not pruner.done:
        model.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        pruner.step()
    model.double()
    masked = model(x.double()).detach()
    pruner.compact()
    torch.testing.assert_close(model(x.double()).detach(), masked)
