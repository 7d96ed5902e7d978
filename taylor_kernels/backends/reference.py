"""The specification: each op in a few lines of PyTorch, for any device, dtype and strides.

Half types are widened to float32 first; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from taylor_kernels.layout import (
    Conv2dFisherArgs,
    GateGradientsArgs,
    ParameterItem,
    accumulator,
)


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items into their outputs."""
    for item in items:
        extents = (item.groups, item.rows // item.groups, item.channels, item.kernel)
        if item.channels_last:
            extents = (*extents[:2], item.kernel, item.channels)
        dtype = accumulator(item.weight.dtype)
        w = item.weight.to(dtype).reshape(extents)
        g = item.grad.to(dtype).reshape(extents)
        terms = _terms(w, g)
        if item.channels_last:
            terms = terms.transpose(3, 4)
        if item.row_out is not None:
            item.row_out.copy_(terms.sum((3, 4)).flatten(1).T)
        if item.col_out is not None:
            item.col_out.copy_(terms.sum((2, 4)).flatten(1).T)


def gate_gradients(args: GateGradientsArgs) -> None:
    """Write the gate gradients of one activation into `args.out`."""
    extents = (args.batch, args.outer, args.channels, args.inner)
    dtype = accumulator(args.output.dtype)
    y = args.output.to(dtype).reshape(extents)
    if args.bias is not None:
        y = y - args.bias.to(dtype)[:, None]
    args.out.copy_((y * args.grad_output.to(dtype).reshape(extents)).sum((1, 3)))


def conv2d_fisher(args: Conv2dFisherArgs) -> None:
    """Write Σ_n of squared per-example weight gradients, or its filters' sums, into `args.out`."""
    dtype = accumulator(args.input.dtype)
    size = (args.groups * args.filters, args.channels, *args.kernel)
    geometry = (args.stride, args.padding, args.dilation, args.groups)
    fisher = args.input.new_zeros(size, dtype=dtype)
    for x, dy in zip(args.input.split(1), args.grad_output.split(1), strict=True):
        fisher += conv2d_weight(x.to(dtype), size, dy.to(dtype), *geometry).square()
    if args.weight is not None:
        fisher = (fisher * args.weight.to(dtype).square()).flatten(1).sum(1)
    args.out.copy_(fisher)


def _terms(w: Tensor, g: Tensor) -> Tensor:
    """[5, ...]: what each moment sums, in the order of MOMENTS."""
    gw = g * w
    return torch.stack((gw, gw * gw, gw.abs(), w * w, g * g))
