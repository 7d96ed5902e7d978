"""FLOPs are counted as PyTorch counts them, whichever operations are taken apart for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from taylor_kernels.pruning.choosing.flops import FlopCount
from taylor_kernels.tracing.tracing import traced

OTHERS = {
    "linear": lambda x, w: F.linear(x, w[:, : x.size(-1)]),
    "vector": lambda x, w: F.linear(x.flatten()[: w.size(1)], w),
    "bias": lambda x, w: F.linear(x[0, 0], w[:, : x.size(-1)], w[:, 0]),
    "matmul": lambda x, w: x @ w[:, : x.size(-1)].T,
    "conv1d": lambda x, w: F.conv1d(x[0], w[:, : 2 * x.size(2)].unflatten(1, (-1, 2))),
    "unbatched": lambda x, w: F.conv2d(x[0], w[:, :3, None, None]),
    "conv2d": lambda x, w: F.conv2d(x, w[:6, :4].unflatten(1, (1, 2, 2)), groups=3),
    "conv3d": lambda x, w: F.conv3d(x[:, :, None], w[:, :3, None, None, None], padding=1),
    "transposed": lambda x, w: F.conv_transpose2d(x, w[:3, :4, None, None], stride=2),
    "norm": lambda x, w: F.batch_norm(x, w[0, :3], w[0, :3].exp(), w[1, :3], w[1, :3]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x * w[0, 0], x, x),
    "softmax": lambda x, w: F.adaptive_avg_pool2d((x * w[0, 0]).softmax(1), 2).flatten(1),
}


class Uses(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(6, 12))

    def forward(self, x):
        return self.function(x, self.weight)


@pytest.mark.parametrize("name", OTHERS)
def test_the_count_is_that_of_pytorch(name):
    model, x = Uses(OTHERS[name]), torch.randn(2, 3, 6, 6)
    count = FlopCount()
    traced(model, x, count=count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert count.total == counter.get_total_flops()
