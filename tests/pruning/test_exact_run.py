"""The proof runs on a part of the example, where pools may be larger than what is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taylor_kernels.pruning.exact_run import SmallPools


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
