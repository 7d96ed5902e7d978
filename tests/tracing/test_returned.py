"""State that a model returns for its own next call keeps no channels; outputs do."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.run.returned import returned_tensors
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


class Regions:
    """Features, in an object of no known type."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


class Detect(nn.Module):
    """It takes regions, if there are some, and returns features of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.feature, self.leave = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, boxes: Regions | None = None) -> dict[str, object]:
        feature = self.feature(self.embed(x).relu())
        return {"out": self.leave(feature.relu()), "boxes": Regions(feature)}


def test_an_object_that_no_name_calls_a_cache_is_an_output():
    assert set(trace(Detect(), torch.randn(3, 6)).skipped) == {"feature", "leave"}


def test_a_state_given_as_none_is_not_given():
    model, x = Attend(4, 3, "state"), torch.randn(1, 4, 5)
    outputs = model(x)
    for given in ((x, None), {"x": x, "state": None}):
        assert len(list(returned_tensors(model, given, outputs))) == 1


class Translate(nn.Module):
    """An encoder and a head that reads it; both are returned, by name or in a tuple."""

    def __init__(self, width: int, named: bool) -> None:
        super().__init__()
        self.named = named
        self.encode = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width))
        self.decode, self.leave = nn.Linear(width, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> object:
        state = self.encode(x)
        out = self.leave(self.decode(state).tanh())
        return {"out": out, "state": {"last": state}} if self.named else (out, [state])


@pytest.mark.parametrize("named", [True, False])
def test_what_is_not_read_may_change_its_width(named):
    width, key = random.randint(6, 10), "out" if named else 0
    x = torch.randn(3, 5)
    last = {"encode.2", "leave"}
    assert trace(Translate(width, named), x).skipped.keys() == last
    assert trace(Translate(width, named), x, outputs=(key,)).skipped.keys() == {"leave"}
    model = Translate(width, named)
    pruner = tk.Pruner(model, x, "taylor_fo", params=0.5, every=1, per_step=2, outputs=(key,))
    while not pruner.done:
        model.zero_grad()
        model(x)[key].square().sum().backward()
        pruner.step()
    assert pruner.widths.keys() == {"encode.0", "encode.2", "decode"}
    masked = model.double()(x.double())[key]
    pruner.compact()
    torch.testing.assert_close(model(x.double())[key], masked)


@pytest.mark.parametrize(
    ("outputs", "error", "match"),
    [
        ("out", TypeError, "sequence of names"),
        ((1.5,), TypeError, "names or places"),
        ((), ValueError, "nothing is in it"),
        (("loss",), ValueError, "returns no 'loss'; what it returns is out, state"),
    ],
)
def test_outputs_that_are_none(outputs, error, match):
    model = Translate(6, named=True)
    for read in (trace, tk.Pruner):
        targets = {"params": 0.5} if read is tk.Pruner else {}
        with pytest.raises(error, match=match):
            read(model, torch.randn(2, 5), outputs=outputs, **targets)
    tk.Pruner(model, torch.randn(2, 5), params=0.5).close()  # nothing is left behind


@pytest.mark.parametrize("read", [False, True])
def test_a_channel_that_is_taken_for_its_shape_alone_keeps_none(read):
    """As transformers' BART does to see how many positions there are."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.places = nn.Linear(5, 7), nn.Embedding(9, 7)
            self.leave = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x)
            one = y[:, :, -1]
            y = y + self.places(torch.arange(one.size(1)))
            return self.leave(y) + (one.mean() if read else 0.0)

    kept = trace(Positions(), torch.randn(2, 4, 5)).skipped
    assert ("embed" in kept) == read
