"""Runs whose layers compute nothing: what is traced is what a run as it is would say."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taylor_kernels.tracing import Channels, hollow, trace, tracing
from taylor_kernels.tracing.chance import Draws
from taylor_kernels.tracing.tracing import traced
from tests.tracing.parts import Apply

#: Layers that are large enough to be left out.
WIDTH, SIDE = 16, 40


@pytest.fixture(autouse=True, scope="module")
def small_networks_are_worth_it():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hollow, "_WORTH_A_RUN", 0)
        yield


class Counting:
    """Runs operations; names those that were run, and those that were made."""

    def __init__(self) -> None:
        self.runs: list[tuple[list[str], list[str]]] = []

    def restart(self) -> None:
        self.runs.append(([], []))

    def run(self, func, args, kwargs, made):
        name = func._schema.name.removeprefix("aten::")
        self.runs[-1][made is not None].append(name)
        return func(*args, **kwargs) if made is None else made


def network(middle: nn.Module) -> nn.Sequential:
    layers = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU()
    return nn.Sequential(*layers, middle, nn.Conv2d(WIDTH, 2, 1))


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


def same(one: Channels, other: Channels) -> bool:
    return (
        one.skipped == other.skipped
        and one.macs == other.macs
        and one.table() == other.table()
        and one.classes.keys() == other.classes.keys()
        and all(
            all(map(torch.equal, one.classes[name], other.classes[name])) for name in one.classes
        )
    )


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
    monkeypatch.setattr(tracing, "can_be_hollow", lambda modules: False)
    assert same(channels, trace(model, x))


def test_layers_are_left_out_where_nobody_reads(monkeypatch):
    model = network(Apply(lambda self, x: torch.where(x.argmax(1, True) > 2, x, x.square())))
    x = torch.randn(1, 3, SIDE, SIDE)
    count = Counting()
    channels = traced(model, x, count=count)
    ((ran, made),) = count.runs
    assert made == ["conv2d", "batch_norm", "relu", "conv2d"]
    assert not {"conv2d", "batch_norm"} & set(ran)
    monkeypatch.setattr(tracing, "can_be_hollow", lambda modules: False)
    assert same(channels, trace(model, x))


class Checking:
    """Runs all operations, and compares what was made in place of a result with that."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def restart(self) -> None:
        self.made = []

    def run(self, func, args, kwargs, made):
        found = func(*args, **kwargs)
        if made is not None:
            self.made.append(func._schema.name.removeprefix("aten::"))
            assert (made.shape, made.dtype) == (found.shape, found.dtype), func
            assert made.stride() == found.stride(), func
            assert (made is args[0]) == (found is args[0]), func
        return found if made is None or found is args[0] else made


#: What is left out behind a layer.
LEFT_OUT = {
    "add": lambda x, other: x + 2 * other,
    "sub": lambda x, other: 1 - x - other,
    "mul": lambda x, other: other * x,
    "div": lambda x, other: x / other,
    "add_": lambda x, other: x.add_(other, alpha=3),
    "relu_": lambda x, other: x.relu_(),
    "silu": lambda x, other: nn.functional.silu(x),
    "gelu": lambda x, other: nn.functional.gelu(x, approximate="tanh"),
    "clamp": lambda x, other: x.clamp(other),
    "hardtanh_": lambda x, other: nn.functional.relu6(x, inplace=True),
    "cat": lambda x, other: torch.cat([x, x.neg(), x], 1),
    "cat of rows": lambda x, other: torch.cat([x, x.neg()], -2),
    "pad": lambda x, other: nn.functional.pad(x, (0, 2, 1, 0)),
    "pad of channels": lambda x, other: nn.functional.pad(x, (0, 0, 0, 0, 0, 3), value=1.0),
    "contiguous": lambda x, other: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@given(st.data())
@settings(max_examples=25)
def test_what_is_made_in_place_of_a_result_is_laid_out_as_it_is(data):
    n, high, wide = (data.draw(st.integers(*ends)) for ends in ((1, 2), (32, 40), (40, 56)))
    names = data.draw(st.lists(st.sampled_from(sorted(LEFT_OUT)), min_size=1, max_size=5))
    narrow = [data.draw(st.booleans()) for _ in range(3)]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.layer(x)
        for name in names:
            whole = (x.size(0), x.size(2), x.size(3))
            sizes = [1 if one else size for one, size in zip(narrow, whole, strict=True)]
            other = self.scale.expand(x.size(1), 1, 1) * x.new_ones(sizes[0], 1, *sizes[1:])
            x = LEFT_OUT[name](x, other)
        return self.last(x.mean((1, 2))[:, None]) + x.mean()

    model = Apply(forward)
    model.layer, model.last = nn.Conv2d(3, WIDTH, 1), nn.LazyLinear(2)
    model.scale = nn.Parameter(torch.rand(1, 1, 1) + 0.5)
    x = torch.randn(n, 3, high, wide)
    with torch.no_grad():
        model(x)
    check = Checking()
    channels = traced(model, x, count=check)
    assert names[0].split(" ")[0] in check.made
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tracing, "can_be_hollow", lambda modules: False)
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


def _convolution(draw: random.Random, dims: int) -> tuple[nn.Module, Tensor]:
    groups = draw.choice((1, 1, 2))
    kernel = [draw.randint(1, 3) for _ in range(dims)]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        2 * groups, 4, kernel, draw.randint(1, 3), draw.randint(0, 2), draw.randint(1, 2),
        groups, draw.random() < 0.5,
    )  # fmt: skip
    return layer, torch.randn(draw.randint(1, 3), 2 * groups, *(draw.randint(1, 9) for _ in kernel))


def _made(draw: random.Random) -> tuple[nn.Module, Tensor]:
    """A layer and its input, which need not fit."""
    kind = draw.choice(("linear", "norm", "instance", 1, 2, 3))
    if isinstance(kind, int):
        layer, x = _convolution(draw, kind)
    elif kind == "linear":
        layer = nn.Linear(3, draw.randint(1, 4), bias=draw.random() < 0.5)
        x = torch.randn(*(draw.randint(1, 4) for _ in range(draw.randint(0, 3))), 3)
    else:
        norm = nn.BatchNorm2d if kind == "norm" else nn.InstanceNorm2d
        layer = norm(4, affine=draw.random() < 0.5)
        x = torch.randn(draw.randint(1, 3), 4, draw.randint(2, 5), draw.randint(2, 5))
    if draw.random() < 0.3 and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if draw.random() < 0.2:
        x = x.transpose(0, -1)
    return layer.eval(), x.double() if draw.random() < 0.1 else x


@given(st.integers(0, 2**32))
@settings(max_examples=80)
def test_what_is_made_is_laid_out_as_what_is_computed(seed):
    draw = random.Random(seed)
    layer, x = _made(draw)
    found: list[tuple[Tensor | None, Tensor]] = []

    class Compared(Counting):
        def run(self, func, args, kwargs, made):
            out = func(*args, **kwargs)
            found.append((made, out))
            return out

    try:
        with torch.no_grad():
            expected = layer(x)
    except RuntimeError:
        expected = None
    layer.extra = nn.Parameter(torch.zeros(1))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hollow, "_WORTH", 0)
        if expected is None:
            with pytest.raises(ValueError, match="the model does not run on them"):
                traced(layer, x)
            return
        traced(layer, x, count=Compared())
    for made, out in found:
        if made is not None:
            assert (made.shape, made.stride(), made.dtype) == (out.shape, out.stride(), out.dtype)
    assert found[-1][1].shape == expected.shape


def test_a_model_with_hooks_of_all_modules_is_run():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not hollow.can_be_hollow([nn.Linear(2, 2)])
    finally:
        handle.remove()
    assert hollow.can_be_hollow([nn.Linear(2, 2)])
