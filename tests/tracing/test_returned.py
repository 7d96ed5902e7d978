"""State that a model returns for its own next call keeps no channels; outputs do."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taylor_kernels.tracing.returned import returned_tensors
from tests.zoo import judging


class State:
    """Keys and values of the steps so far."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = list(tensors)


class Attend(nn.Module):
    """Attention that returns what it has seen, for the next call or for everyone."""

    def __init__(self, heads: int, dim: int, name: str) -> None:
        super().__init__()
        self.head_dim, self.name = dim, name
        self.read = nn.Linear(5, heads * dim)
        self.qkv = nn.ModuleList(nn.Linear(heads * dim, heads * dim) for _ in range(3))
        self.write = nn.Linear(heads * dim, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor, state: State | None = None) -> dict[str, object]:
        y = self.read(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in self.qkv
        )
        if state is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(state.tensors, (k, v), strict=True))
        z = functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
        return {"out": self.leave(self.write(z).tanh()), self.name: State(k, v)}


@pytest.mark.parametrize("seed", range(3))
def test_heads_go_though_their_state_is_returned(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads = draw.randint(3, 5)
    model, x = Attend(heads, draw.randint(2, 4), "state"), torch.randn(1, 4, 5)
    pruner, _ = judging.new_pruner(model, x, 0.8)
    assert set(pruner.skipped) == {"leave"}
    while not pruner.done:
        model(x)["out"].square().sum().backward()
        pruner.step()
    model.eval()
    masked = model(x)["out"]
    pruner.compact()
    torch.testing.assert_close(model(x)["out"], masked, rtol=0, atol=1e-5)
    first = model(x[:, :2])
    both = model(x[:, 2:], first["state"])["out"]
    assert both.shape == masked[:, 2:].shape  # the smaller model takes its own state


def test_what_is_no_argument_is_an_output():
    model, x = Attend(4, 3, "attention"), torch.randn(1, 4, 5)
    pruner, _ = judging.new_pruner(model, x, 0.9)
    assert {"qkv.1", "qkv.2"} <= set(pruner.skipped)


def test_a_state_that_the_example_gives_is_an_output():
    model, x = Attend(4, 3, "state"), torch.randn(1, 4, 5)
    outputs = model(x)
    assert len(list(returned_tensors(model, x, outputs))) == 1
    assert len(list(returned_tensors(model, {"x": x, "state": outputs["state"]}, outputs))) == 3
    assert len(list(returned_tensors(model, (x, outputs["state"]), outputs))) == 3
    assert len(list(returned_tensors(model, x, tuple(outputs.values())))) == 3
