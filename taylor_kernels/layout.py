"""How a tensor looks to a kernel: a dense block with named extents.

The kernels know two orders of a parameter and one of an activation (csrc/filter_moments.h,
csrc/gate_gradients.h). Tensors in those orders are passed as they are; any other strides are
copied into one first, so a kernel never meets them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: dtypes that every kernel reads; float64 is for the reference and the native CPU backend.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FilterMomentsItem(NamedTuple):
    """One parameter of a `filter_moments` call; mirrors the struct of the same name in csrc/."""

    weight: Tensor
    grad: Tensor
    rows: int
    channels: int
    kernel: int
    groups: int
    channels_last: bool
    row_out: Tensor | None  # [rows, 5]
    col_out: Tensor | None  # [groups * channels, 5]


class GateGradientsArgs(NamedTuple):
    """A `gate_gradients` call; mirrors the struct of the same name in csrc/."""

    output: Tensor
    grad_output: Tensor
    bias: Tensor | None
    batch: int
    outer: int
    channels: int
    inner: int
    out: Tensor  # [batch, channels]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over `dtype` come out in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter_item(
    weight: Tensor, grad: Tensor, groups: int, row_out: Tensor | None, col_out: Tensor | None
) -> FilterMomentsItem:
    """Describe a parameter of 1 to 5 dimensions, not empty, as rows x channels x kernel."""
    shape = weight.shape
    rows = shape[0]
    channels = shape[1] if len(shape) > 1 else 1
    kernel = weight.numel() // (rows * channels)
    channels_last = False
    if not weight.is_contiguous():
        last = _channel_last(weight, 1)
        channels_last = last.is_contiguous()
        weight = last if channels_last else weight.contiguous()
    if channels_last or not grad.is_contiguous():
        grad = (_channel_last(grad, 1) if channels_last else grad).contiguous()
    return FilterMomentsItem(
        weight, grad, rows, channels, kernel, groups, channels_last, row_out, col_out
    )


def activation_args(
    output: Tensor, grad_output: Tensor, bias: Tensor | None, channel_dim: int, out: Tensor
) -> GateGradientsArgs:
    """Describe an activation of at least 2 dimensions as batch x outer x channels x inner."""
    batch, channels = output.size(0), output.size(channel_dim)
    outer = math.prod(output.shape[1:channel_dim])
    inner = math.prod(output.shape[channel_dim + 1 :])
    if not output.is_contiguous():
        last = _channel_last(output, channel_dim)
        if last.is_contiguous():
            output, grad_output = last, _channel_last(grad_output, channel_dim)
            outer, inner = outer * inner, 1
    return GateGradientsArgs(
        output.contiguous(),
        grad_output.contiguous(),
        None if bias is None else bias.contiguous(),
        batch,
        outer,
        channels,
        inner,
        out,
    )


def _channel_last(tensor: Tensor, channel_dim: int) -> Tensor:
    return tensor.movedim(channel_dim, -1) if tensor.dim() > 1 else tensor
