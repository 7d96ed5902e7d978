"""What is cut lies in memory as it did: optimizers read weights and their state side by side."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn, optim

import taylor_kernels as tk

FUSED = {
    "AdamW": partial(optim.AdamW, lr=0.01, fused=True),
    "Adagrad": partial(optim.Adagrad, lr=0.05, fused=True),
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam": partial(optim.Adam, lr=0.01, amsgrad=True, foreach=True),
}


def network(dims: int) -> nn.Module:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    layers = (conv(3, 8, 3, padding=1), nn.Tanh(), conv(8, 7, 2), nn.Tanh(), conv(7, 2, 1))
    return nn.Sequential(*layers).double().to(memory_format=form)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", FUSED)
def test_state_follows_weights_that_are_not_contiguous(name, dims):
    torch.manual_seed(dims)
    x, outputs = torch.randn(2, 3, *[4] * dims, dtype=torch.float64), []
    first = network(dims)
    for cut in (False, True):
        model = copy.deepcopy(first)
        optimizer = FUSED[name](model.parameters())
        pruner = tk.Pruner(
            model, x, "magnitude_l2", filters=0.6, every=2, per_step=2, optimizer=optimizer
        )
        for _ in range(8):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            pruner.step()
            optimizer.step()
            if cut:
                pruner.compact()
        assert pruner.done
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-8)
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if value is not None and value.dim() == parameter.dim() and value.dim():
                assert value.stride() == parameter.stride()


class NoTokens(nn.Module):
    """Tokens put before those of the input, of which a setting asks for none."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(0, 12))
        self.read, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens.expand(len(x), -1, -1)
        return self.leave(torch.cat([tokens, self.read(x)], 1).tanh())


@pytest.mark.parametrize("name", FUSED)
def test_state_of_a_parameter_without_entries_is_cut(name):
    model, x = NoTokens(), torch.randn(2, 4, 5)
    optimizer = FUSED[name](model.parameters())
    pruner = tk.Pruner(model, x, params=0.7, every=1, optimizer=optimizer)
    while not pruner.done:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        pruner.step()
        optimizer.step()
    pruner.compact()
    width = model.read.out_features
    assert width < 12
    assert model.tokens.shape == (0, width)
    for value in optimizer.state[model.tokens].values():
        assert value.dim() == 0 or value.shape == (0, width)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
