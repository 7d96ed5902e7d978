"""A masked block hands nothing of its branch on, whatever the branch computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.pruning.blocks import mask_block
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.blocks import replace_modules


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


#: Outputs, slopes, or both are infinite or nan.
FUNCTIONS = {
    "exp": lambda x: (1e3 * x).exp(),
    "quotient": lambda x: x / torch.zeros_like(x),
    "root": lambda x: (x - x).abs().sqrt(),
    "logarithm": lambda x: (x * 0).log(),
    "product": lambda x: x * 1e30 * 1e30,
    "nan": lambda x: x * torch.nan,
}


class Residual(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 9), Function(function), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    inputs = inputs.clone().requires_grad_()
    model(inputs).square().sum().backward()
    return {"": inputs.grad} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_without_the_block(name):
    model = nn.Sequential(
        nn.Linear(4, 6), Residual(FUNCTIONS[name]), Residual(torch.tanh), nn.Linear(6, 3)
    )
    inputs = torch.randn(5, 4)
    assert not all(g.isfinite().all() for g in gradients(model, inputs).values())
    blocks, _ = trace(model, inputs, blocks=True).find_blocks(model)
    block = next(block for block in blocks if block.holds("1.branch.0"))
    without = copy.deepcopy(model)
    replace_modules(without, block.places)
    expected = gradients(without, inputs)
    handle = mask_block(model, block)
    for masked in (model, copy.deepcopy(model)):  # a copy's hook is of the copy's parameters
        found = gradients(masked, inputs)
        for own, gradient in found.items():
            if own.startswith("1."):
                assert torch.equal(gradient, torch.zeros_like(model.get_parameter(own))), own
            else:
                assert torch.equal(gradient, expected[own]), own
    handle.remove()
    assert not all(g.isfinite().all() for g in gradients(model, inputs).values())
