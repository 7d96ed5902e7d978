"""Runs whose layers compute nothing: what is traced is what a run as it is would say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.tracing import trace
from taylor_kernels.tracing.run import hollow, runs
from taylor_kernels.tracing.run.chance import Draws
from taylor_kernels.tracing.tracing import traced
from tests.tracing.hollow_runs import SIDE, WIDTH, Counting, network, same
from tests.tracing.parts import Apply

pytestmark = pytest.mark.usefixtures("small_networks_are_worth_it")


class Choosing(nn.Module):
    """Runs one of two layers, as what it reads of its input says."""

    def __init__(self, read) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        level = self.read(x)
        return self.low(x) if level < 0.5 else self.high(x) + x


def swallowed(x: Tensor) -> float:
    try:
        return float(x.max() > 0)
    except Exception:
        return 0.0


#: Ways to a Python number that is one where any element is positive.
READS = {
    "item": lambda x: float((x.amax() > 0).item()),
    "condition": lambda x: 1.0 if (x > 0).any() else 0.0,
    "number": lambda x: float(x.max().sign()),
    "equal": lambda x: 1.0 - torch.equal(x, torch.zeros_like(x)),
    "numpy": lambda x: float(x.detach().numpy().max() > 0),
    "list": lambda x: float(max(x.flatten().tolist()) > 0),
    "nonzero": lambda x: float(len(x.nonzero()) > 0),
    "mask": lambda x: float(x[x > 0].numel() > 0),
    "place": lambda x: float(x.flatten()[x.argmax()]),
    "unique": lambda x: float(x.unique().numel() > 1),
    "swallowed": swallowed,
}


@pytest.mark.parametrize("read", READS)
def test_code_that_reads_values_gets_them(read, monkeypatch):
    model = network(Choosing(READS[read]))
    x = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        ran = "low" if READS[read](model[:3].eval()(x)) < 0.5 else "high"
    count = Counting()
    channels = traced(model, x, count=count)
    assert len(count.runs) == 2
    assert not count.runs[1][1]
    other = {"low": "high", "high": "low"}[ran]
    assert any(name.startswith(f"3.{ran}.") for name in set(channels.classes) - channels.unread)
    assert f"3.{other}.weight" in channels.unread
    monkeypatch.setattr(runs, "can_be_hollow", lambda modules: False)
    assert same(channels, trace(model, x))


def test_layers_are_left_out_where_nobody_reads(monkeypatch):
    model = network(Apply(lambda self, x: torch.where(x.argmax(1, True) > 2, x, x.square())))
    x = torch.randn(1, 3, SIDE, SIDE)
    count = Counting()
    channels = traced(model, x, count=count)
    ((ran, made),) = count.runs
    assert made == ["conv2d", "batch_norm", "relu", "conv2d"]
    assert not {"conv2d", "batch_norm"} & set(ran)
    monkeypatch.setattr(runs, "can_be_hollow", lambda modules: False)
    assert same(channels, trace(model, x))


class Dropping(nn.Module):
    """A branch of some examples: code that asks for the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), 1, 1, 1).add(0.5).floor() if self.training else x


def test_a_run_that_only_counts_computes_no_layers():
    """Train mode draws, so that the model is run once more to see whether it does anything else."""
    model = network(Dropping())
    ran: list[str] = []
    call = Draws.__call__

    def drawing(self, func, args, kwargs, made):
        if made is None:
            ran.append(func._schema.name.removeprefix("aten::"))
        return call(self, func, args, kwargs, made)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Draws, "__call__", drawing)
        channels = trace(model, torch.randn(1, 3, SIDE, SIDE))
    assert "rand" in ran
    assert not {"conv2d", "batch_norm", "relu", "mul"} & set(ran)
    assert not channels.trained


def test_what_is_made_of_parameters_alone_is_computed():
    """A table that code keeps for its next run holds what it held."""
    kept: dict[str, Tensor] = {}
    table = nn.Linear(2, WIDTH)

    def biased(self: nn.Module, x: Tensor) -> Tensor:
        if "bias" not in kept:
            kept["bias"] = self.table(self.places)[:, :, None, None].detach()
        return x + kept["bias"]

    middle = Apply(biased)
    middle.table = table
    middle.register_buffer("places", torch.randn(1, 2))
    trace(network(middle), torch.randn(1, 3, SIDE, SIDE))
    torch.testing.assert_close(kept["bias"][:, :, 0, 0], table(middle.places).detach())


@pytest.mark.parametrize("where", ["attribute", "table"])
def test_what_code_keeps_of_a_run_holds_values(where):
    """In an attribute it is what was there before, as after any trace."""
    table: dict[str, Tensor] = {}

    def keeping(self: nn.Module, x: Tensor) -> Tensor:
        if where == "table":
            table["last"] = x
        else:
            self.last = x
        return x + 1

    model, x = network(Apply(keeping)), torch.randn(2, 3, SIDE, SIDE)
    count = Counting()
    traced(model, x, count=count)
    assert len(count.runs) == 1 + (where == "table")
    assert not hasattr(model[3], "last")
    if table:
        with torch.no_grad():
            torch.testing.assert_close(table["last"], model[:3].eval()(x))


class Remembering(nn.Module):
    """In train mode it keeps what it is given, or its mean, out of a trace's sight; the same
    operations run as in eval mode."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean()
        if self.training:
            self.keep(x, mean)
        return x + mean


@pytest.mark.parametrize("what", ["input", "mean"])
def test_what_code_keeps_in_train_mode_alone_holds_values(what):
    table: dict[str, Tensor] = {}
    middle = Remembering(lambda x, mean: table.update(last=x if what == "input" else mean))
    model, x = network(middle), torch.randn(2, 3, SIDE, SIDE)
    assert hollow.can_be_hollow(model.modules())
    trace(model, x)
    with torch.no_grad():
        expected = model[:3].eval()(x)
    torch.testing.assert_close(table["last"], expected if what == "input" else expected.mean())


def test_hooks_see_values():
    model, seen = network(nn.Identity()), []
    x = torch.randn(2, 3, SIDE, SIDE)
    model[3].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    trace(model, x)
    with torch.no_grad():
        torch.testing.assert_close(seen[0], model[:3].eval()(x))


def test_a_model_with_hooks_of_all_modules_is_run():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not hollow.can_be_hollow([nn.Linear(2, 2)])
    finally:
        handle.remove()
    assert hollow.can_be_hollow([nn.Linear(2, 2)])
