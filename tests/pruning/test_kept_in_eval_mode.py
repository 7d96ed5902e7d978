"""What modules make of their parameters in eval mode and keep there, as LeViT its biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk
from taylor_kernels.pruning.proof.exchanged import Exchanged
from taylor_kernels.tracing import trace
from tests.zoo.judging import batch, distance, in_double, loss

HEADS, TOKENS = 4, 5


class Attention(nn.Module):
    """Its biases for each head are looked up once in eval mode, or made as that begins."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads = how, HEADS
        self.qkv, self.project = nn.Linear(6, 24), nn.Linear(8, 6)
        self.biases = nn.Parameter(torch.randn(HEADS, TOKENS))
        places = torch.arange(TOKENS)
        self.register_buffer("places", (places[:, None] - places).abs())
        self.found: dict[str, Tensor] = {}
        self.ready: list[Tensor] = []

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.how == "as the mode changes":
            with torch.no_grad():
                self.made = None if mode else self.look_up()
        elif mode and self.how == "another table":
            self.found = {}
        elif mode:
            self.found.clear()
            self.ready.clear()
        return self

    def look_up(self) -> Tensor:
        return self.biases[:, self.places]

    def kept(self) -> Tensor:
        if self.how == "as the mode changes":
            return self.made
        if self.how == "in a list":
            self.ready.extend([] if self.ready else [self.look_up()])
            return self.ready[0]
        return self.found.setdefault("cpu", self.found.get("cpu", self.look_up()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), TOKENS, self.heads, -1).transpose(1, 2).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) * 0.7 + (self.look_up() if self.training else self.kept())
        return self.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Linear(3, 6), Attention(how), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(F.gelu(x + self.attention(x)))


HOW = ["as the mode changes", "another table", "the same table", "in a list"]
X = torch.randn(1, TOKENS, 3)


@pytest.mark.filterwarnings("ignore:compact")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("trained", [False, True])
def test_heads_go_and_what_is_kept_follows(how, trained):
    """Pruned from train mode to train mode, or in eval mode all along."""
    torch.manual_seed(HOW.index(how))
    model = Model(how).eval()
    model(X)  # what is kept is there before
    pruner = tk.Pruner(model, X, "magnitude_l2", params=0.5, every=1, per_step=0.2)
    assert list(pruner.skipped) == ["leave"]
    while not pruner.done:
        if trained:
            loss(model.train(), batch(X)).backward()
        pruner.step()
    fresh = batch(X)
    masked = in_double(model, fresh)
    model.eval() if trained else None
    assert distance(masked, in_double(model, fresh)) < 1e-12
    model.train(trained)
    pruner.compact()
    assert model.training is trained
    assert model.attention.biases.shape[0] < HEADS
    model.eval() if trained else None
    with torch.no_grad():
        torch.testing.assert_close(model(fresh).double(), masked[0], rtol=1e-4, atol=1e-5)
    assert distance(masked, in_double(model, fresh)) < 1e-12


class Silent(Attention):
    """Writes what it keeps into the memory of another tensor, of which PyTorch does not tell."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__("not at all")
        self.write, self.table = write, torch.zeros(HEADS, TOKENS, TOKENS)

    def train(self, mode: bool = True) -> nn.Module:
        nn.Module.train(self, mode)
        if not mode:
            self.write(self.table, self.look_up().detach())
        return self


SILENT = [
    lambda table, values: table.data.copy_(values),
    lambda table, values: setattr(table, "data", values),
    lambda table, values: table.numpy().__setitem__(slice(None), values),
]


def nothing(table: Tensor, values: Tensor) -> None:
    """What most modules do that say that they do something as their mode changes."""


@pytest.mark.parametrize("how", [*HOW, *SILENT, nothing])
def test_the_proof_renews_what_is_made_anew_and_nothing_else(how):
    """To renew is a walk through the model before each run."""
    model = Model(HOW[0])
    model.attention = Attention(how) if how in HOW else Silent(how)
    model.eval()(X)
    channels = trace(model, X)
    with torch.no_grad():
        model.attention.biases += torch.rand(HEADS, TOKENS)  # as the noise of a proof
    before = dict(vars(model.attention))
    run = Exchanged(model, dict(model.named_modules()), channels)
    assert run.kept == ([] if how is nothing else [model.attention])
    assert all(value is before[name] for name, value in vars(model.attention).items())


PARTS = {
    "rows behind the first": lambda table, rows: table[1:].add_(1),
    "columns behind the first": lambda table, rows: table[:, 1:].add_(1),
    "numbers that change places": lambda table, rows: table.copy_(table.flip(0)),
    "beside a mask": lambda table, rows: table[rows // 2 :].add_(1),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("shape", "dtype", "transposed"),
    [
        ((6, 20000), torch.float32, False),
        ((20000, 16), torch.bfloat16, False),
        ((20000, 16), torch.float64, True),
        ((6, 20000), torch.complex64, True),
        ((3, 17), torch.uint8, False),
    ],
)
def test_parts_of_a_large_tensor_that_are_made_anew_are_noticed(shape, dtype, transposed, part):
    table = torch.empty(shape).uniform_(0, 50).to(dtype)
    if part == "beside a mask" and dtype.is_floating_point:
        table[0] = -torch.inf
    table = table.t() if transposed else table
    model = Model(HOW[0])
    model.attention = Silent(lambda held, _: PARTS[part](held.data, len(held)))
    model.attention.table = table
    model.eval()
    run = Exchanged(model, dict(model.named_modules()), trace(model, X))
    assert run.kept == [model.attention]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_leaves_what_is_kept_as_it_was(how, training):
    model = Model(how).train(training)
    if not training:
        model(X)
    attention = model.attention
    before = dict(attention.found), list(attention.ready), getattr(attention, "made", None)
    tables = attention.found, attention.ready
    trace(model, X)
    assert (attention.found, attention.ready) == tables
    assert attention.found is tables[0]
    after = dict(attention.found), list(attention.ready), getattr(attention, "made", None)
    for one, other in zip(before, after, strict=True):
        assert one is other or list(map(id, one)) == list(map(id, other))
    assert all(module.training is training for module in model.modules())


class Merged(nn.Linear):
    """Adds an update of low rank to its weight in eval mode, in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up, self.merged = nn.Parameter(torch.randn(outputs, 2)), False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_whose_weight_is_merged_in_eval_mode_is_its_own(training):
    """What multiplies the update out is no use of the layer from outside."""
    model = nn.Sequential(Merged(4, 8), nn.Tanh(), Merged(8, 6), nn.Tanh(), nn.Linear(6, 2))
    channels = trace(model.train(training), torch.randn(3, 4))
    assert {"0", "2", "4"} <= channels.layers.keys() - channels.outside.keys()
    sides = {slot.owner: slot.index.shape for g in channels.groups for slot in g.producers}
    assert (sides["0"], sides["2"]) == ((8, 1), (6, 1))


@pytest.mark.filterwarnings("ignore:compact")
@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_is_merged_in_eval_mode_is_as_it_was_and_pruned_right(training):
    torch.manual_seed(3)
    model = nn.Sequential(Merged(4, 8), nn.Tanh(), Merged(8, 6), nn.Tanh(), nn.Linear(6, 2))
    model.train(training)
    x, before = torch.randn(3, 4), model[0].weight.clone()
    trace(model, x)
    assert torch.equal(model[0].weight, before)
    assert model[0].merged is not training
    pruner = tk.Pruner(model, x, "magnitude_l2", params=0.6, every=1, per_step=0.2)
    while not pruner.done:
        pruner.step()
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.train(not training)(x), masked, rtol=1e-4, atol=1e-5)
