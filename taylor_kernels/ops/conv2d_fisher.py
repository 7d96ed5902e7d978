"""conv2d_fisher, linear_fisher: per-example weight gradients, squared and summed, never stored.

With x the input of a layer, dy = ∂L/∂y for its output and g_n the gradient of example n alone,

    fisher[o, c, i, j] = Σ_n g_n[o, c, i, j]²,   g_n = the weight gradient from x[n] and dy[n]

If the loss is a mean over N examples, dy carries 1/N, so N·fisher is the mean over examples of the
squared gradient of each example's own loss: the diagonal of the empirical Fisher matrix, which OBD
(LeCun et al. 1989) and Molchanov et al. (CVPR 2019, section 3.1) take for that of the Hessian.
Squares are of each example's gradient, not of the minibatch's. A linear layer is a 1x1 convolution
over its tokens. Kernels: csrc/common/conv2d_fisher.h, backends/triton/conv2d_fisher.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taylor_kernels.backends import check_name, kernel
from taylor_kernels.layout import accumulator, conv2d_fisher_args
from taylor_kernels.ops._as_2d import as_image
from taylor_kernels.ops._convolutions import (
    check_convolution,
    check_linear,
    check_weight,
    geometry_of,
    may_round,
)
from taylor_kernels.ops._direct import caller, cpu_threads, one_output
from taylor_kernels.ops._library import define


def conv2d_fisher(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Σ_n (weight gradient of example n)² of a 2-D convolution, from its input and ∂L/∂output.

    Where the loss is a mean over N examples, N times this is the diagonal of the empirical Fisher
    matrix (Molchanov et al., CVPR 2019, section 3.1). The arguments are those of
    `torch.nn.grad.conv2d_weight`.

    Args:
        input: [N, C, H, W] (float32, float16, bfloat16 or float64); any strides (contiguous and
            channels_last are read in place).
        weight_size: (O, C / groups, kernel height, kernel width).
        grad_output: ∂L/∂y, [N, O, H_out, W_out], same dtype and device.
        stride, padding, dilation: an int, or one for height and one for width.
        groups: as the convolution's.
        weight: [O, C / groups, kH, kW], same device. With it the result is reduced to filters:
            Σ_k w_k² Σ_n g_{n,k}², and nothing of the weight's size is written.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        float32 (float64 for float64 input): `weight_size`, or [O] with `weight`. float32 products
        are rounded to TF32 on a GPU where `torch.backends.cudnn` (`allow_tf32`, or
        `conv.fp32_precision`) says so. Not differentiable: it has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors.
        ValueError: sizes that do not follow from each other (the message says what was expected),
            dtypes or devices that do not match.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> x, dy = torch.ones(4, 1, 3, 3), torch.ones(4, 2, 2, 2)
        >>> tk.conv2d_fisher(x, (2, 1, 2, 2), dy)[0].tolist()  # each example's gradient is 4
        [[[64.0, 64.0], [64.0, 64.0]]]
        >>> tk.conv2d_fisher(x, (2, 1, 2, 2), dy, weight=torch.ones(2, 1, 2, 2)).tolist()
        [256.0, 256.0]
    """
    check_name(backend)
    if native := caller():
        called = native.call_conv2d_fisher(
            input,
            weight_size,
            grad_output,
            stride,
            padding,
            dilation,
            groups,
            weight,
            cpu_threads(backend),
        )
        found = one_output(
            "conv2d_fisher", called, input, backend, lambda plan: plan.set_tf32(may_round(False))
        )
        if found is not None:
            return found
    geometry = geometry_of(2, weight_size, stride, padding, dilation, groups)
    check_convolution(input, grad_output, weight, *geometry)
    fisher: Tensor = _op(input, grad_output, weight, *geometry, False, backend)
    return fisher


def linear_fisher(
    input: Tensor, grad_output: Tensor, *, weight: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Σ_n (weight gradient of example n)² of a linear layer; tokens are summed in the example.

    N times this is the diagonal of the empirical Fisher matrix, as of `conv2d_fisher`.

    Args:
        input: [N, *, I], dim 0 the example (float32, float16, bfloat16 or float64).
        grad_output: ∂L/∂y, [N, *, O], same leading dimensions, dtype and device.
        weight: [O, I], same device. With it the result is Σ_i w_i² Σ_n g_{n,i}² per neuron.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        float32 (float64 for float64 input): [O, I], or [O] with `weight`. float32 products are
        rounded to TF32 on a GPU where `torch.backends.cuda.matmul` (`allow_tf32`, or
        `fp32_precision`) says so. Not differentiable: it has no grad_fn.

    Raises:
        TypeError, ValueError, RuntimeError: as `conv2d_fisher`.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> x, dy = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
        >>> tk.linear_fisher(x, dy).tolist()  # 1² + (2·3)², 2² + (2·4)²
        [[37.0, 68.0]]
        >>> tk.linear_fisher(x, dy, weight=torch.tensor([[1.0, 0.0]])).tolist()
        [37.0]
    """
    check_name(backend)
    if native := caller():
        called = native.call_linear_fisher(input, grad_output, weight, cpu_threads(backend))
        found = one_output(
            "conv2d_fisher", called, input, backend, lambda plan: plan.set_tf32(may_round(True))
        )
        if found is not None:
            return found
    check_linear(input, grad_output)
    size = [grad_output.size(-1), input.size(-1)]
    check_weight(weight, size, input)
    x, dy = (as_image(tensor) for tensor in (input, grad_output))
    fisher: Tensor = _op(
        x, dy, None if weight is None else weight[:, :, None, None], [*size, 1, 1],
        [1, 1], [0, 0], [1, 1], 1, True, backend,
    )  # fmt: skip
    return fisher if weight is not None else fisher[:, :, 0, 0]


def _run(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    weight_size: Sequence[int],
    *rest: Any,
) -> Tensor:
    stride, padding, dilation, groups, matmul, backend = rest
    run = kernel("conv2d_fisher", input.device, input.dtype, backend)
    out = _empty(input, grad_output, weight, weight_size)
    if not (input.numel() and grad_output.numel()):
        return out.zero_()
    geometry = geometry_of(2, weight_size, stride, padding, dilation, groups)
    check_convolution(input, grad_output, weight, *geometry)
    args = conv2d_fisher_args(input, grad_output, weight, *geometry, may_round(matmul), out)
    run(args)
    return out


def _empty(
    input: Tensor, grad_output: Tensor, weight: Tensor | None, weight_size: Sequence[int], *_: Any
) -> Tensor:
    shape = weight_size if weight is None else weight_size[:1]
    return input.new_empty(tuple(shape), dtype=accumulator(input.dtype))


_op = define(
    "conv2d_fisher(Tensor input, Tensor grad_output, Tensor? weight, SymInt[] weight_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool matmul, "
    "str? backend) -> Tensor",
    _run,
    _empty,
)
