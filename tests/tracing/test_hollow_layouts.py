"""What is made in the place of a result that is not computed has its shape, strides and dtype."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taylor_kernels.tracing import trace
from taylor_kernels.tracing.run import hollow, runs
from taylor_kernels.tracing.tracing import traced
from tests.tracing.hollow_runs import WIDTH, Counting, same
from tests.tracing.parts import Apply

pytestmark = pytest.mark.usefixtures("small_networks_are_worth_it")


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
        patched.setattr(runs, "can_be_hollow", lambda modules: False)
        assert same(channels, trace(model, x))


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
