"""The Fisher diagonal of one layer, per filter: Σ_k w_k² Σ_n g_{n,k}² from its inputs and dy.

`conv2d_fisher` and `linear_fisher` compute the common layers. The others are brought to their form:
a 1-D convolution is a 2-D one of height 1; padding that the op does not know is added to the input;
a transposed convolution is a convolution of dy, so that x takes the place of its output gradient.
3-D convolutions, and several uses of one layer, are computed example by example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight, conv3d_weight
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from taylor_kernels.layout import accumulator
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher, linear_fisher
from taylor_kernels.statistics.layers import Layer, filter_axis

#: The input of one use of a layer, and the gradient of its output.
Use = tuple[Tensor, Tensor]


def example_count(layer: Layer, input: Tensor) -> int:
    """How many examples an input holds: its dim 0, or one where it has no batch."""
    return input.size(0) if _is_batched(layer, input) else 1


def layer_fisher(
    layer: Layer, uses: Sequence[Use], weight: Tensor, backend: str | None = None
) -> Tensor:
    """[F]: per output filter Σ_k w_k² Σ_n (Σ over uses of g_{n,k})².

    Args:
        uses: inputs and output gradients of equally many examples; an input is brought to its
            gradient's dtype, which is what the layer computed in under autocast.
        weight: the layer's, as it was used.
    """
    uses = [
        (x.to(dy.dtype), dy) if _is_batched(layer, x) else (x.to(dy.dtype)[None], dy[None])
        for x, dy in uses
    ]
    if not isinstance(layer, _ConvNd):
        weight = weight.movedim(filter_axis(layer), 0)
        if len(uses) == 1:
            x, dy = uses[0]
        else:  # all uses of an example are tokens of it
            x, dy = (torch.cat([_tokens(use[i]) for use in uses], 1) for i in (0, 1))
        return linear_fisher(x, dy, weight=weight, backend=backend)

    problems = [_as_convolution(layer, x, dy, weight) for x, dy in uses]
    first = problems[0]
    by_example = len(uses) > 1 or len(layer.kernel_size) == 3
    if not by_example and not isinstance(layer, _ConvTransposeNd):
        return conv2d_fisher(*first, weight=weight.view(first.weight_size), backend=backend)
    fisher = _by_example(problems) if by_example else conv2d_fisher(*first, backend=backend)
    return _filters(layer, fisher.view_as(weight) * weight.to(fisher.dtype).square())


class _Convolution(NamedTuple):
    """A convolution seen from its weight: the arguments of `conv2d_fisher`."""

    input: Tensor
    weight_size: tuple[int, ...]
    grad_output: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _as_convolution(layer: _ConvNd, x: Tensor, dy: Tensor, weight: Tensor) -> _Convolution:
    stride, dilation = layer.stride, layer.dilation
    padding = (0,) * len(stride) if isinstance(layer.padding, str) else layer.padding
    if isinstance(layer, _ConvTransposeNd):
        x, dy = dy, x
        # Output padding beyond the stride makes room for positions that no x is at.
        room = [
            (x.size(2 + i) + 2 * padding[i] - dilation[i] * (k - 1) - 1) // stride[i] + 1
            for i, k in enumerate(layer.kernel_size)
        ]
        missing = [r - size for r, size in zip(room, dy.shape[2:], strict=True)]
        if any(missing):
            dy = F.pad(dy, [pad for m in reversed(missing) for pad in (0, m)])
    elif isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(stride)
    size = tuple(weight.shape)
    if len(stride) == 1:
        x, dy = x.unsqueeze(2), dy.unsqueeze(2)
        size, stride, dilation = (*size[:2], 1, size[2]), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    return _Convolution(x, size, dy, stride, padding, dilation, layer.groups)


def _by_example(uses: Sequence[_Convolution]) -> Tensor:
    """Σ_n of squares, in the weight's shape, of gradients that are formed one at a time."""
    first = uses[0]
    dtype = accumulator(first.input.dtype)
    gradient = conv3d_weight if len(first.stride) == 3 else conv2d_weight
    fisher = first.input.new_zeros(first.weight_size, dtype=dtype)
    for n in range(first.input.size(0)):
        one = slice(n, n + 1)
        total = sum(
            gradient(use.input[one].to(dtype), use[1], use.grad_output[one].to(dtype), *use[3:])
            for use in uses
        )
        fisher += total.square()
    return fisher


def _filters(layer: _ConvNd, table: Tensor) -> Tensor:
    """[F]: sums of a weight-shaped table over all but the output filters."""
    if isinstance(layer, _ConvTransposeNd):  # [in, out / groups, ...]
        table = table.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return table.flatten(1).sum(1)


def _tokens(tensor: Tensor) -> Tensor:
    """[N, *, features] as [N, tokens, features]."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _is_batched(layer: Layer, tensor: Tensor) -> bool:
    least = len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2
    return tensor.dim() >= least
