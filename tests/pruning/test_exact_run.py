"""Runs of the proof: on a part of the example, with the operations that PyTorch would run."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from taylor_kernels.pruning.exact_run import InDouble, SmallPools


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, stride=1, padding=1), nn.AvgPool2d(7)],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_pools_fit_whatever_is_left_of_an_image(pool, size):
    with SmallPools():
        out = pool(torch.ones(1, 2, size, size))
    assert out.numel()
    if pool.padding:
        assert torch.equal(out, pool(torch.ones(1, 2, size, size)))


@pytest.mark.parametrize("seed", range(30))
def test_groups_that_run_at_once_are_the_convolution(seed):
    draw = random.Random(seed)
    dims, groups = draw.choice([1, 2, 2, 3]), draw.choice([1, 2, 3, 6])
    ins, outs = groups * draw.randint(1, 3), groups * draw.randint(1, 3)
    kernel, dilation = draw.randint(1, 3), draw.randint(1, 2)
    sizes = [draw.randint(dilation * (kernel - 1) + 1, 9) for _ in range(dims)]
    layer = getattr(nn, f"Conv{dims}d")(
        ins, outs, kernel, draw.randint(1, 3), draw.choice([0, 1, 2, "valid"]), dilation, groups,
        bias=draw.random() < 0.5,
    ).double()  # fmt: skip
    x = torch.randn(draw.randint(0, 3), ins, *sizes, dtype=torch.float64)
    if draw.random() < 0.3 and dims == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    with InDouble():
        found = layer(x)
    # Sums of at most 81 products of numbers below ten: rounding is below 1e-12.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("wrong", ["groups", "weight", "bias"])
def test_groups_that_do_not_fit_are_refused_as_ever(wrong):
    layer = nn.Conv2d(4, 4, 1, groups=2).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    if wrong == "groups":
        layer.groups = 4
    elif wrong == "weight":
        layer.weight = nn.Parameter(layer.weight[:3])
    else:
        layer.bias = nn.Parameter(layer.bias[:3])
    with InDouble(), pytest.raises(RuntimeError):
        layer(x)
