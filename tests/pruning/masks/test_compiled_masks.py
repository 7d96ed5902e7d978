"""A model that was compiled before it was pruned follows masks of experts, norms and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.pruning.mixtures import Model


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def blocks() -> tuple[nn.Module, Tensor, dict]:
    model = nn.Sequential(nn.Linear(4, 8), Branch(8), Branch(8), Branch(8), nn.Linear(8, 3))
    return model, torch.randn(5, 4), {"blocks": True, "params": 0.4, "min_filters": 8}


def experts() -> tuple[nn.Module, Tensor, dict]:
    return Model(6), torch.randn(6, 7, 4), {"params": 0.1 + 0.9 * 2 / 6, "ignore": ["enter"]}


def norms() -> tuple[nn.Module, Tensor, dict]:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    return model, torch.randn(5, 4), {"params": 0.5}


@pytest.mark.parametrize("build", [blocks, experts, norms])
def test_a_compiled_model_follows_them(build):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs, options = build()
    pruner = tk.Pruner(model, inputs, "magnitude_l2", every=1, **options)
    before = model(inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(inputs), before)
    while not pruner.done:
        pruner.step()
        torch.testing.assert_close(compiled(inputs), model(inputs))
    assert not torch.allclose(model(inputs), before)
    if build is blocks:
        assert any(record.blocks for record in pruner.history)
    elif build is experts:
        assert pruner.widths["mixture.gate"] < 6
    else:
        assert pruner.widths["0"] < 8
    masked = model(inputs)
    with pytest.warns(UserWarning, match="new parameters"):
        pruner.compact()
    torch.testing.assert_close(compiled(inputs), masked, rtol=1e-4, atol=1e-5)


def test_masked_norms_are_compiled_without_a_word():
    """Dynamo reads their hooks; what it cannot read of Python it tells the user of, each time."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, inputs, options = norms()
    pruner = tk.Pruner(model, inputs, "magnitude_l2", every=1, **options)
    compiled = torch.compile(model, backend="eager")
    pruner.step()
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(compiled(inputs), model(inputs))
    assert counters["frames"]["ok"]
    assert not [reason for reason in counters["graph_break"] if "builtin" in reason]
