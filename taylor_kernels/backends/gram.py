"""Per-example gradient norms from Gram matrices, by PyTorch's own matrix products.

With u_t the patch of the input that a convolution reads at its output position t, and d_t the
output's gradient there, the weight gradient of an example is Σ_t d_t u_tᵀ, and so

    Σ_k g_k² = Σ_{t, s} <u_t, u_s> <d_t, d_s>

(Goodfellow 2015, arXiv 1510.01799, for one position; Rochette et al. 2019, arXiv 1912.06015).
Where positions are few against the weight, two Gram matrices take fewer products than a gradient.
<u_t, u_s> is the sum over the taps of products of two pixels, so one Gram matrix of the image's
pixels serves all taps; where strides leave out most of them, patches are laid out instead.

The terms are as large as the inputs' mean squared, however small their sum: inputs that lie a
hundred spreads off 0, and output gradients that add up to 0 over the positions, leave 1e-4 of a
gradient's terms and 1e-8 of these. So the products are in float64, which keeps more of the sum
than gradients in float32 do, whatever float32 inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_kernels.layout import accumulator

#: Elements of workspace, in float64: what a chunk of examples may take.
WORKSPACE = 2**19
#: What an element costs that is copied, or added to another, in products: neither is done in
#: registers.
ELEMENT = 8
#: So many times the products of Gram matrices are as long as those of the kernels: float64 against
#: the inputs' dtype.
SLOWER = 5.0
#: The same on a GPU without float64 units to speak of.
MUCH_SLOWER = 64.0
#: Compute capabilities of GPUs that have these units.
_WITH_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))

Pair = Sequence[int]


def is_shorter(
    image: Pair,
    out_image: Pair,
    weight_size: Sequence[int],
    padding: Pair,
    groups: int,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether Gram matrices take less time than the kernels, which compute gradients."""
    positions = math.prod(out_image)
    gradients = positions * math.prod(weight_size)
    costs = _costs(image, out_image, weight_size, padding, groups)
    if positions == 1 and _is_pointwise(weight_size, padding):
        return min(costs) < gradients
    return _slower(device, dtype) * min(costs) < gradients


def _slower(device: torch.device, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1.0
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in _WITH_FLOAT64:
        return MUCH_SLOWER
    return SLOWER if device.type in ("cpu", "cuda") else math.inf


def conv2d_example_norms(
    input: Tensor,
    grad_output: Tensor,
    weight_size: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    out: Tensor,
) -> None:
    """Write Σ_k g_{n,k}² of each example into `out`, [N]; neither tensor is empty."""
    size, image, out_image = list(weight_size), list(input.shape[2:]), list(grad_output.shape[2:])
    pointwise = _is_pointwise(size, padding)
    if pointwise:
        step_h, step_w = stride
        input = input[:, :, ::step_h, ::step_w][:, :, : out_image[0], : out_image[1]]
        image, stride = out_image, (1, 1)
    pixels, patches = _costs(image, out_image, size, padding, groups)
    by_pixels = pixels <= patches
    side = math.prod(image) if by_pixels else size[1] * math.prod(size[2:])
    positions = math.prod(out_image)
    each = (
        input[0].numel()
        + grad_output[0].numel()
        + groups * (side + 2 * positions) * max(side if by_pixels else positions, positions)
    )
    share = max(1, WORKSPACE // each)
    for x, dy, norms in zip(
        input.split(share), grad_output.split(share), out.split(share), strict=True
    ):
        if positions == 1 and pointwise:  # squares, of which none cancels another
            columns, rows = (_in_groups(t, groups, accumulator(t.dtype)) for t in (x, dy))
            found = columns.square().sum((1, 2)) * rows.square().sum((1, 2))
        else:
            if by_pixels:
                products = _of_pixels(x, size, stride, padding, dilation, groups, out_image)
            else:
                geometry = (tuple(each) for each in (size[2:], dilation, padding, stride))
                products = _gram(_in_groups(F.unfold(x.double(), *geometry), groups))
            found = products.mul_(_gram(_in_groups(dy, groups))).sum((1, 2))
        # What cancels leaves the rounding of its terms, which may be below zero.
        norms.copy_(found.view(-1, groups).sum(1).clamp_(min=0))


def _of_pixels(
    x: Tensor,
    size: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    out_image: Pair,
) -> Tensor:
    """<u_t, u_s>, [N * groups, positions, positions], from the products of any two pixels."""
    gram = _gram(_in_groups(x, groups))
    if _is_pointwise(size, padding):
        return gram
    height, width = x.shape[2:]
    gram = gram.view(-1, height, width, height, width)
    sums = gram.new_zeros((len(gram), *out_image, *out_image))
    for i in range(size[2]):
        to_h, from_h = _inside(i, stride[0], padding[0], dilation[0], height, out_image[0])
        for j in range(size[3]):
            to_w, from_w = _inside(j, stride[1], padding[1], dilation[1], width, out_image[1])
            sums[:, to_h, to_w, to_h, to_w] += gram[:, from_h, from_w, from_h, from_w]
    return sums.view(len(gram), math.prod(out_image), -1)


def _inside(
    tap: int, stride: int, padding: int, dilation: int, extent: int, outputs: int
) -> tuple[slice, slice]:
    """The outputs along an axis at which a tap lies inside of the image, and its pixels there."""
    shift = padding - tap * dilation
    first = min(outputs, max(0, -(-shift // stride)))
    count = max(0, min(outputs, -(-(extent + shift) // stride)) - first)
    start = max(0, first * stride - shift) if count else 0
    return slice(first, first + count), slice(start, start + count * stride, stride)


def _gram(rows: Tensor) -> Tensor:
    """Of [B, features, positions], the products of any two positions."""
    return torch.bmm(rows.mT, rows)


def _in_groups(tensor: Tensor, groups: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[N, C, *] as [N * groups, C / groups, positions], in the dtype of the sums."""
    wide = tensor.to(dtype).flatten(2)
    return wide.reshape(len(wide) * groups, wide.size(1) // groups, -1)


def _is_pointwise(size: Sequence[int], padding: Pair) -> bool:
    return list(size[2:]) == [1, 1] and list(padding) == [0, 0]


def _costs(
    image: Pair,
    out_image: Pair,
    size: Sequence[int],
    padding: Pair,
    groups: int,
) -> tuple[int, int]:
    """In products: by the Gram matrix of pixels, and by that of patches."""
    positions, taps, channels = math.prod(out_image), math.prod(size[2:]), size[1] * groups
    rows = positions**2 * size[0]
    if _is_pointwise(size, padding):
        image = out_image
    pixels = math.prod(image) ** 2 * channels + (taps - 1) * positions**2 * groups * ELEMENT
    patches = positions**2 * channels * taps + positions * channels * taps * ELEMENT
    return rows + pixels, rows + patches
