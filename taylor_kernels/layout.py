"""How a tensor looks to a kernel: a dense block with named extents.

A call of a kernel is a NamedTuple, whose members the native module reads by name
(csrc/bindings/records.h). The kernels know two orders of a parameter and one of an activation
(csrc/common/parameter.h, csrc/common/gate_gradients.h). Tensors in those orders are passed as they
are; any other strides are copied into one first, so a kernel never meets them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: dtypes that every kernel reads; float64 is for the reference and the native CPU backend.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ParameterItem(NamedTuple):
    """One parameter of a call; csrc/common/parameter.h says what its members are."""

    weight: Tensor
    grad: Tensor | None
    hvp: Tensor | None
    rows: int
    channels: int
    kernel: int
    groups: int
    row_out: Tensor | None  # [rows, sums]
    col_out: Tensor | None  # [groups * channels, sums]
    dtype: torch.dtype
    channels_last: bool
    stream: int  # of random signs, for an op that draws some


class RademacherItem(NamedTuple):
    """One vector of a `rademacher` call; see csrc/common/rademacher.h."""

    out: Tensor  # from a 16-byte address on
    elements: int
    dtype: torch.dtype
    stream: int


class GateGradientsArgs(NamedTuple):
    """A `gate_gradients` call; see csrc/common/gate_gradients.h."""

    output: Tensor
    grad_output: Tensor
    bias: Tensor | None
    batch: int
    outer: int
    channels: int
    inner: int
    out: Tensor  # [batch, channels]
    dtype: torch.dtype


class Conv2dFisherArgs(NamedTuple):
    """A `conv2d_fisher` or `conv2d_example_norms` call; see csrc/common/conv2d_fisher.h."""

    input: Tensor
    grad_output: Tensor
    weight: Tensor | None
    out: Tensor  # [groups * filters, channels, *kernel], [groups * filters] with a weight, [batch]
    batch: int
    groups: int
    channels: int  # of a group, as are the filters
    filters: int
    image: tuple[int, int]
    out_image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    input_channels_last: bool
    grad_channels_last: bool
    tf32: bool


class ScoreItem(NamedTuple):
    """The elements of one tensor that are ranked; see csrc/common/global_threshold.h."""

    a: Tensor
    b: Tensor | None  # with the elements of a in the order in which that has them
    elements: int
    dtype: torch.dtype
    ranked: bool


class GlobalThresholdArgs(NamedTuple):
    """A `global_threshold` call; see csrc/common/global_threshold.h."""

    table: Tensor  # [3] int64
    items: list[ScoreItem]
    wanted: int
    is_signed: bool


class MomentumItem(NamedTuple):
    """One parameter of a `sparse_momentum` call; see csrc/common/sparse_momentum.h."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    row_scores: Tensor | None  # float32
    elements: int
    row_elements: int
    first: int
    dtype: torch.dtype
    ranked: bool
    lr: float
    decay: float
    beta: float


class SparseMomentumArgs(NamedTuple):
    """A `sparse_momentum` call; see csrc/common/sparse_momentum.h."""

    table: Tensor  # [3] int64
    items: list[MomentumItem]


class MirrorItem(NamedTuple):
    """One tensor of a `mirror_step` call; csrc/common/mirror_step.h says what its members are.

    Tensors are flat, in the order in which the parameter lies in memory.
    """

    param: Tensor  # [elements]
    grad: Tensor | None  # [elements]; None: the stored value stays, and is projected
    value: Tensor | None  # [planes, elements]; None: the parameter itself is updated
    first: Tensor | None  # [1 or planes, elements]: the momentum, or Adam's first moment
    second: Tensor | None  # Adam's second moment
    elements: int
    dtype: torch.dtype
    projection: int  # a place in PROJECTIONS
    levels: int
    update: int  # a place in UPDATES
    direction: int  # a place in DIRECTIONS
    rounded: bool
    rate: float
    decay: float
    decay2: float
    eps: float
    beta: float
    next_beta: float
    scale: float
    weight_decay: float


#: What a `mirror_step` can do, in the order of the enumerations of csrc/common/mirror_step.h.
PROJECTIONS = ("identity", "tanh", "softmax", "sign")
UPDATES = ("dual", "jacobian", "mirror")
DIRECTIONS = ("gradient", "momentum", "adam")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over `dtype` come out in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter_item(
    weight: Tensor,
    grad: Tensor | None,
    hvp: Tensor | None,
    groups: int,
    row_out: Tensor | None,
    col_out: Tensor | None,
    stream: int = 0,
) -> ParameterItem:
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
    return ParameterItem(
        weight,
        _stored_like(grad, channels_last),
        _stored_like(hvp, channels_last),
        rows,
        channels,
        kernel,
        groups,
        row_out,
        col_out,
        weight.dtype,
        channels_last,
        stream,
    )


def in_order_of(tensor: Tensor, values: Tensor) -> Tensor:
    """A vector in the shape of `tensor`, its elements in the order in which kernels number those.

    That is their order in memory if the tensor is contiguous or channels_last, else the contiguous.
    """
    if not tensor.is_contiguous():
        last = _channel_last(tensor, 1)
        if last.is_contiguous():
            return values.view(last.shape).movedim(-1, 1)
    return values.view(tensor.shape)


def in_memory_order(like: Tensor, tensor: Tensor) -> Tensor:
    """A view of `tensor` that is contiguous if it lies as `like` does, channels_last for example.

    If `like` is neither contiguous nor channels_last, the view that is contiguous if `tensor` is.
    """
    if like.is_contiguous() or not _channel_last(like, 1).is_contiguous():
        return tensor
    return _channel_last(tensor, 1)


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
        output.dtype,
    )


def conv2d_fisher_args(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tf32: bool,
    out: Tensor,
) -> Conv2dFisherArgs:
    """Describe the input and the output gradient of a 2-D convolution, neither of them empty."""
    if weight is not None and weight.dtype not in (input.dtype, torch.float32):
        weight = weight.to(accumulator(input.dtype))
    x_last, dy_last = (
        not t.is_contiguous() and _channel_last(t, 1).is_contiguous() for t in (input, grad_output)
    )
    return Conv2dFisherArgs(
        input if x_last else input.contiguous(),
        grad_output if dy_last else grad_output.contiguous(),
        None if weight is None else weight.contiguous(),
        out,
        input.size(0),
        groups,
        weight_size[1],
        weight_size[0] // groups,
        (input.size(2), input.size(3)),
        (grad_output.size(2), grad_output.size(3)),
        (weight_size[2], weight_size[3]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        input.dtype,
        (input if weight is None else weight).dtype,
        x_last,
        dy_last,
        tf32,
    )


def _stored_like(tensor: Tensor | None, channels_last: bool) -> Tensor | None:
    if tensor is None:
        return None
    return (_channel_last(tensor, 1) if channels_last else tensor).contiguous()


def _channel_last(tensor: Tensor, channel_dim: int) -> Tensor:
    return tensor.movedim(channel_dim, -1) if tensor.dim() > 1 else tensor
