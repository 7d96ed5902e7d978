"""Squared norms of per-example weight gradients, of convolutions and linear layers, never stored.

With g_n the gradient of example n alone,

    norms[n] = Σ_k g_{n,k}²

over all of a layer's weight, which is what clipping per example (DP-SGD, Abadi et al. 2016) and the
spread of gradients need. Two ways lead there. The kernels of `conv2d_fisher` compute each example's
gradient tile by tile and add up its squares, T·O·I products for T positions and O·I weights. Gram
matrices (backends/gram.py) take about T²·(O + I), in float64, since these terms cancel. Where no
backend is named the shorter one is taken, by a rule on shapes, dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, gram, kernel
from taylor_kernels.layout import accumulator, conv2d_fisher_args
from taylor_kernels.ops._as_2d import as_2d, as_image
from taylor_kernels.ops._convolutions import (
    check_convolution,
    check_linear,
    geometry_of,
    may_round,
)
from taylor_kernels.ops._library import define

#: Elements of the images that a 3-D convolution is laid out as at a time.
WORKSPACE = 2**22

Ints = int | Sequence[int]


def conv2d_example_norms(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Σ_k g_{n,k}² of the weight gradient of each example n of a 2-D convolution: squared norms.

    No tensor of N times the weight's size is made. The arguments are those of
    `torch.nn.grad.conv2d_weight`.

    Args:
        input: [N, C, H, W] (float32, float16, bfloat16 or float64); any strides (contiguous and
            channels_last are read in place).
        weight_size: (O, C / groups, kernel height, kernel width).
        grad_output: ∂L/∂y, [N, O, H_out, W_out], same dtype and device.
        stride, padding, dilation: an int, or one for height and one for width.
        groups: as the convolution's.
        backend: one of `taylor_kernels.available_backends()`, whose kernels compute gradients tile
            by tile; None picks them by device, or takes Gram matrices by PyTorch's matrix products
            where the shape says that these are shorter.

    Returns:
        [N], float32 (float64 for float64 input). Of a loss that is a mean over the examples, N²
        times it belongs to each example's own loss. float32 products are rounded to TF32 on a GPU
        only where `torch.backends.cudnn` says so. Not differentiable: it has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors.
        ValueError: sizes that do not follow from each other (the message says what was expected),
            dtypes or devices that do not match.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> x, dy = torch.ones(3, 1, 3, 3), torch.ones(3, 2, 2, 2)
        >>> dy[1] = 0.5
        >>> tk.conv2d_example_norms(x, (2, 1, 2, 2), dy).tolist()  # 8 weights; gradients 4, 2, 4
        [128.0, 32.0, 128.0]
    """
    return _convolution(
        2, input, weight_size, grad_output, stride, padding, dilation, groups, backend
    )


def conv1d_example_norms(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Σ_k g_{n,k}² of a 1-D convolution's weight gradients, as `conv2d_example_norms`.

    Args:
        input: [N, C, L].
        weight_size: (O, C / groups, kernel length).
        grad_output: ∂L/∂y, [N, O, L_out], same dtype and device.
        stride, padding, dilation: an int, or a sequence of one.
        groups, backend: as of `conv2d_example_norms`.

    Returns:
        [N], float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError, RuntimeError: as `conv2d_example_norms`.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> x, dy = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 2)
        >>> tk.conv1d_example_norms(x, (1, 1, 2), dy).tolist()  # (1 + 2)² + (2 + 3)²
        [34.0]
    """
    return _convolution(
        1, input, weight_size, grad_output, stride, padding, dilation, groups, backend
    )


def conv3d_example_norms(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Σ_k g_{n,k}² of a 3-D convolution's weight gradients, as `conv2d_example_norms`.

    Some examples at a time are laid out as images, with a copy for each of the kernel's taps along
    the depth.

    Args:
        input: [N, C, D, H, W].
        weight_size: (O, C / groups, kernel depth, height, width).
        grad_output: ∂L/∂y, [N, O, D_out, H_out, W_out], same dtype and device.
        stride, padding, dilation: an int, or three.
        groups, backend: as of `conv2d_example_norms`.

    Returns:
        [N], float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError, RuntimeError: as `conv2d_example_norms`.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> x, dy = torch.ones(2, 1, 2, 3, 3), torch.ones(2, 1, 1, 2, 2)
        >>> tk.conv3d_example_norms(x, (1, 1, 2, 2, 2), dy).tolist()  # 8 weights; gradients 4
        [128.0, 128.0]
    """
    return _convolution(
        3, input, weight_size, grad_output, stride, padding, dilation, groups, backend
    )


def linear_example_norms(
    input: Tensor, grad_output: Tensor, *, backend: str | None = None
) -> Tensor:
    """Σ_k g_{n,k}² of a linear layer's weight gradients; tokens are summed inside the example.

    Args:
        input: [N, *, I], dim 0 the example (float32, float16, bfloat16 or float64).
        grad_output: ∂L/∂y, [N, *, O], same leading dimensions, dtype and device.
        backend: as of `conv2d_example_norms`.

    Returns:
        [N], float32 (float64 for float64 input). float32 products are rounded to TF32 on a GPU
        only where `torch.backends.cuda.matmul` says so. Not differentiable: it has no grad_fn.

    Raises:
        TypeError, ValueError, RuntimeError: as `conv2d_example_norms`.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> x, dy = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
        >>> tk.linear_example_norms(x, dy).tolist()  # (1² + 2²)·1², (3² + 4²)·2²
        [5.0, 100.0]
    """
    check_name(backend)
    check_linear(input, grad_output)
    size = [grad_output.size(-1), input.size(-1), 1, 1]
    x, dy = as_image(input), as_image(grad_output)
    norms: Tensor = _op(x, dy, size, [1, 1], [0, 0], [1, 1], 1, True, backend)
    return norms


def _convolution(
    dims: int,
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str | None,
) -> Tensor:
    check_name(backend)
    geometry = geometry_of(dims, weight_size, stride, padding, dilation, groups)
    check_convolution(input, grad_output, None, *geometry)
    norms: Tensor = _op(input, grad_output, *geometry, False, backend)
    return norms


def _run(
    input: Tensor,
    grad_output: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    matmul: bool,
    backend: str | None,
) -> Tensor:
    run = kernel("conv2d_example_norms", input.device, input.dtype, backend)
    out = _empty(input)
    if not (input.numel() and grad_output.numel()):
        return out.zero_()
    dims = len(weight_size) - 2
    geometry = geometry_of(dims, weight_size, stride, padding, dilation, groups)
    check_convolution(input, grad_output, None, *geometry)
    tf32 = may_round(matmul)
    share = len(input)
    if dims == 3:
        copied = max(1, input[0].numel() * weight_size[2])
        share = max(1, WORKSPACE // copied)
    for x, dy, norms in zip(
        input.split(share), grad_output.split(share), out.split(share), strict=True
    ):
        x, dy, plane = as_2d(x, dy, *geometry)
        shapes = x.shape[2:], dy.shape[2:], plane[0]
        if backend is None and gram.is_shorter(*shapes, plane[2], groups, x.device, x.dtype):
            with torch.autocast(x.device.type, enabled=False):
                gram.conv2d_example_norms(x, dy, *plane, norms)
        else:
            run(conv2d_fisher_args(x, dy, None, *plane, tf32, norms))
    return out


def _empty(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((input.size(0),), dtype=accumulator(input.dtype))


_op = define(
    "conv_example_norms(Tensor input, Tensor grad_output, SymInt[] weight_size, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, bool matmul, str? backend) -> Tensor",
    _run,
    _empty,
)
