"""gate_gradients: per example, the gradient of a gate on every channel of a layer's output.

A gate z_c = 1 multiplies channel c of the output y. With dy = ∂L/∂y,

    s[n, c] = ∂L_n/∂z_c = Σ_positions (y − b_c) · dy

which, with b the layer's bias, is also Σ_j g_{n,c,j} w_{c,j} over the weights of filter c: a linear
or convolution layer is linear in its weights, so the per-example weight gradients g_{n} need not
exist. Gates: Molchanov et al. (CVPR 2019), section 3.2. Kernels: csrc/common/gate_gradients.h,
backends/triton/gate_gradients.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taylor_kernels.backends import check_name, kernel
from taylor_kernels.layout import FLOATS, accumulator, activation_args
from taylor_kernels.ops._checks import alike, check_like, check_tensor
from taylor_kernels.ops._direct import caller, cpu_threads, one_output
from taylor_kernels.ops._library import define


def gate_gradients(
    output: Tensor,
    grad_output: Tensor,
    *,
    bias: Tensor | None = None,
    channel_dim: int = 1,
    backend: str | None = None,
) -> Tensor:
    """s[n, c] = Σ_positions (output − bias_c) · grad_output, in one read of both.

    ∂L_n/∂z_c of a gate z_c = 1 on channel c (Molchanov et al., CVPR 2019, section 3.2).

    Args:
        output: a layer's output y, two or more dimensions, dim 0 the example: [N, C], [N, C, H, W],
            [N, T, C] with channel_dim=2, ... (float32, float16, bfloat16 or float64); any strides
            (contiguous and channels_last are read in place).
        grad_output: ∂L/∂y, same shape, dtype and device.
        bias: [C], subtracted from y; same device, any supported dtype.
        channel_dim: the channels' dimension, not 0; may be negative.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        [N, C] float32 (float64 for float64 input). Not differentiable: it has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors.
        ValueError: shapes, dtypes or devices that do not match; an impossible `channel_dim`.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> output = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # one example, two channels
        >>> grad_output = torch.tensor([[[1.0, 1.0], [2.0, -1.0]]])
        >>> tk.gate_gradients(output, grad_output).tolist()
        [[3.0, 2.0]]
        >>> tk.gate_gradients(output, grad_output, bias=torch.tensor([1.0, 0.0])).tolist()
        [[1.0, 2.0]]
    """
    check_name(backend)
    if native := caller():
        called = native.call_gate_gradients(
            output, grad_output, bias, channel_dim, cpu_threads(backend)
        )
        found = one_output("gate_gradients", called, output, backend)
        if found is not None:
            return found
    check_tensor(output, "output")
    check_like(grad_output, "grad_output", output, "output")
    if isinstance(channel_dim, int) and -output.dim() < channel_dim < 0:
        channel_dim += output.dim()
    _check(output, grad_output, bias, channel_dim)
    gates: Tensor = _op(output, grad_output, bias, channel_dim, backend)
    return gates


def _check(output: Tensor, grad_output: Tensor, bias: Tensor | None, channel_dim: int) -> None:
    """What the kernels trust, of every call, through the function above or not."""
    if output.dtype not in FLOATS or not alike([output], [grad_output]):
        check_tensor(output, "output")
        check_like(grad_output, "grad_output", output, "output")
    if output.dim() < 2:
        raise ValueError(f"output: has shape {tuple(output.shape)}; expected [N, C, ...] or more")
    if not isinstance(channel_dim, int) or not 0 <= channel_dim < output.dim():
        raise ValueError(
            f"channel_dim: {channel_dim!r} is not a dimension of {output.dim()}-D output"
        )
    if channel_dim == 0:
        raise ValueError("channel_dim: 0 is the example; the channels must be another dimension")
    if bias is not None:
        check_tensor(bias, "bias")
        if (
            bias.shape != output.shape[channel_dim : channel_dim + 1]
            or bias.device != output.device
        ):
            raise ValueError(
                f"bias: shape {tuple(bias.shape)} on {bias.device} does not match the "
                f"{output.size(channel_dim)} channels of output on {output.device}"
            )


def _run(
    output: Tensor, grad_output: Tensor, bias: Tensor | None, channel_dim: int, backend: str | None
) -> Tensor:
    _check(output, grad_output, bias, channel_dim)
    run = kernel("gate_gradients", output.device, output.dtype, backend)
    out = _empty(output, grad_output, bias, channel_dim)
    if not output.numel():
        return out.zero_()
    bias = None if bias is None else bias.to(output.dtype)  # under autocast y is half, b float32
    args = activation_args(output, grad_output, bias, channel_dim, out)
    run(args)
    return out


def _empty(
    output: Tensor, grad_output: Tensor, bias: Tensor | None, channel_dim: int, *_: Any
) -> Tensor:
    shape = (output.size(0), output.size(channel_dim))
    return output.new_empty(shape, dtype=accumulator(output.dtype))


_op = define(
    "gate_gradients(Tensor output, Tensor grad_output, Tensor? bias, int channel_dim, "
    "str? backend) -> Tensor",
    _run,
    _empty,
)
