"""Linear layers and 1-D and 3-D convolutions as 2-D ones, so that one kernel serves all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def as_image(tensor: Tensor) -> Tensor:
    """[N, *, F] as [N, F, tokens, 1], features innermost in memory."""
    tokens = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)
    return tokens.transpose(1, 2).unsqueeze(-1)


def as_2d(
    x: Tensor,
    dy: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, tuple[list[int], list[int], list[int], list[int], int]]:
    """The call as one of a 2-D convolution with the same sums of squares."""
    if len(size) == 3:
        x, dy, size = x.unsqueeze(2), dy.unsqueeze(2), [*size[:2], 1, size[2]]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    elif len(size) == 5:
        x, dy, size = _conv3d_as_2d(x, dy, size, stride, padding, dilation)
        stride, padding, dilation = stride[1:], [0, padding[2]], dilation[1:]
    return x, dy, (size, stride, padding, dilation, groups)


def _conv3d_as_2d(
    input: Tensor,
    grad_output: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, list[int]]:
    """A 3-D convolution as one over two dimensions, with the same weight gradients in each example.

    The kernel's taps along the depth become input channels, and what each output of the depth reads
    becomes an image; these stand one below the other, each as high as a whole number of steps, and
    no row that a filter reads across two of them has an output gradient. The convolution that is
    left has the height's and the width's stride and dilation, the width's padding, and the weight's
    size that is returned.
    """
    filters, channels, taps, *kernel = weight_size
    n, _, depth, rows = grad_output.shape[:4]
    pad_d, pad_h, _ = padding
    height = input.size(3) + 2 * pad_h
    steps = -(-height // stride[1])
    x = F.pad(input, (0, 0, pad_h, pad_h + steps * stride[1] - height, pad_d, pad_d))
    reach = (depth - 1) * stride[0] + 1
    at_taps = [x[:, :, i * dilation[0] : i * dilation[0] + reach : stride[0]] for i in range(taps)]
    x = torch.stack(at_taps, 2).reshape(n, -1, depth * steps * stride[1], input.size(4))
    dy = F.pad(grad_output, (0, 0, 0, steps - rows)).flatten(2, 3)
    outputs = (x.size(2) - dilation[1] * (kernel[0] - 1) - 1) // stride[1] + 1
    return x, dy[:, :, :outputs], [filters, channels * taps, *kernel]
