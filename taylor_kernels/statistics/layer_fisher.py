"""The Fisher diagonal of one layer's weight, or per filter, from its inputs and output gradients.

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
from taylor_kernels.ops.example_norms import (
    conv2d_example_norms,
    conv3d_example_norms,
    linear_example_norms,
)
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
    uses = _batched(layer, uses)
    if not isinstance(layer, _ConvNd):
        weight = weight.movedim(filter_axis(layer), 0)
        return linear_fisher(*_as_one(uses), weight=weight, backend=backend)
    problems = [_as_convolution(layer, use, weight.shape) for use in uses]
    first = problems[0]
    if not _by_example_alone(problems) and not isinstance(layer, _ConvTransposeNd):
        return conv2d_fisher(*first, weight=weight.view(first.weight_size), backend=backend)
    fisher = _of_convolutions(problems, backend)
    return _filters(layer, fisher.view_as(weight) * weight.to(fisher.dtype).square())


def weight_fisher(layer: Layer, uses: Sequence[Use], backend: str | None = None) -> Tensor:
    """Σ_n (Σ over uses of g_n)² in the shape of the layer's weight; `uses` as of layer_fisher."""
    uses = _batched(layer, uses)
    if isinstance(layer, _ConvNd):
        size = layer.weight.shape
        problems = [_as_convolution(layer, use, size) for use in uses]
        return _of_convolutions(problems, backend).view(size)
    x, dy = _as_one(uses)
    if x.size(1) == 1:  # g_n is an outer product, so that the squares are a matrix product
        dtype = accumulator(x.dtype)
        fisher = dy[:, 0].to(dtype).square().T @ x[:, 0].to(dtype).square()
    else:
        fisher = linear_fisher(x, dy, backend=backend)
    return fisher.movedim(0, filter_axis(layer))


def weight_norms(layer: Layer, use: Use) -> Tensor:
    """[N]: Σ over a layer's weight of g_n²."""
    (use,) = _batched(layer, [use])
    if not isinstance(layer, _ConvNd):
        return linear_example_norms(*_as_one([use]))
    problem = _as_convolution(layer, use, layer.weight.shape)
    norms = conv3d_example_norms if len(problem.stride) == 3 else conv2d_example_norms
    return norms(*problem)


def weight_gradients(layer: Layer, use: Use) -> Tensor:
    """[N, *weight]: the gradient of each example, for a few of them."""
    (use,) = _batched(layer, [use])
    if isinstance(layer, _ConvNd):
        size = layer.weight.shape
        problem = _as_convolution(layer, use, size)
        one = [_gradient(problem, slice(n, n + 1)) for n in range(len(use[0]))]
        return torch.stack(one).view(-1, *size)
    x, dy = (tensor.to(accumulator(tensor.dtype)) for tensor in _as_one([use]))
    return (dy.transpose(1, 2) @ x).movedim(1, 1 + filter_axis(layer))


def _batched(layer: Layer, uses: Sequence[Use]) -> list[Use]:
    return [
        (x.to(dy.dtype), dy) if _is_batched(layer, x) else (x.to(dy.dtype)[None], dy[None])
        for x, dy in uses
    ]


def _as_one(uses: Sequence[Use]) -> Use:
    """[N, tokens, features]: all uses of an example are tokens of it."""
    tokens = [(_tokens(x), _tokens(dy)) for x, dy in uses]
    if len(tokens) == 1:
        return tokens[0]
    return torch.cat([x for x, _ in tokens], 1), torch.cat([dy for _, dy in tokens], 1)


class _Convolution(NamedTuple):
    """A convolution seen from its weight: the arguments of `conv2d_fisher`."""

    input: Tensor
    weight_size: tuple[int, ...]
    grad_output: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _as_convolution(layer: _ConvNd, use: Use, size: tuple[int, ...]) -> _Convolution:
    x, dy = use
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
    if len(stride) == 1:
        x, dy = x.unsqueeze(2), dy.unsqueeze(2)
        size, stride, dilation = (*size[:2], 1, size[2]), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    return _Convolution(x, size, dy, stride, padding, dilation, layer.groups)


def _by_example_alone(uses: Sequence[_Convolution]) -> bool:
    """Whether no op computes it: several uses, or three dimensions."""
    return len(uses) > 1 or len(uses[0].stride) == 3


def _of_convolutions(uses: Sequence[_Convolution], backend: str | None) -> Tensor:
    """Σ_n of squares, in the weight's shape as a convolution sees it."""
    first = uses[0]
    if not _by_example_alone(uses):
        return conv2d_fisher(*first, backend=backend)
    fisher = first.input.new_zeros(first.weight_size, dtype=accumulator(first.input.dtype))
    for n in range(first.input.size(0)):
        one = slice(n, n + 1)
        fisher += sum((_gradient(use, one) for use in uses), fisher.new_zeros(())).square()
    return fisher


def _gradient(use: _Convolution, examples: slice) -> Tensor:
    dtype = accumulator(use.input.dtype)
    gradient = conv3d_weight if len(use.stride) == 3 else conv2d_weight
    x, dy = (t[examples].to(dtype) for t in (use.input, use.grad_output))
    return gradient(x, use.weight_size, dy, *use[3:])


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
