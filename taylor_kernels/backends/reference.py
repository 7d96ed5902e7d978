"""The specification: each op in a few lines of PyTorch, for any device, dtype and strides.

Half types are widened to float32 first; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from taylor_kernels.layout import (
    DIRECTIONS,
    PROJECTIONS,
    UPDATES,
    Conv2dFisherArgs,
    GateGradientsArgs,
    MirrorItem,
    ParameterItem,
    RademacherItem,
    accumulator,
)


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items into their outputs."""
    for item in items:
        assert item.grad is not None
        w, g = _widened(item.weight, item.grad)
        gw = g * w
        _write_sums(item, gw, gw * gw, gw.abs(), w * w, g * g)


def second_order_moments(items: Sequence[ParameterItem]) -> None:
    """Write (Σ q, Σ q²), q = w·(g − ½h), of all items into their outputs."""
    for item in items:
        assert item.grad is not None
        assert item.hvp is not None
        w, g, h = _widened(item.weight, item.grad, item.hvp)
        q = w * (g - h / 2)
        _write_sums(item, q, q * q)


def hutchinson_moments(items: Sequence[ParameterItem], seed: int) -> None:
    """Write Σ w² z (Hz), z the random signs of the seed, of all items into their outputs."""
    for item in items:
        assert item.hvp is not None
        w, hz = _widened(item.weight, item.hvp)
        _write_sums(item, w * (w * random_signs(seed, item.stream, w) * hz))


def rademacher(items: Sequence[RademacherItem], seed: int) -> None:
    """Fill the outputs of all items with random signs."""
    for item in items:
        item.out.copy_(random_signs(seed, item.stream, item.out))


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


def mirror_step(items: Sequence[MirrorItem]) -> None:
    """Update the stored values of all items by their gradients, and write what they project to."""
    for item in items:
        dtype = accumulator(item.dtype)
        if item.value is None:
            assert item.grad is not None
            w, g = item.param.to(dtype), item.grad.to(dtype)
            w = w - item.rate * _direction(item, g + item.weight_decay * w, 0)
            item.param.copy_(w)
            continue
        if item.grad is not None:
            _update_values(item, item.grad.to(dtype) * item.scale)
        is_mirror = UPDATES[item.update] == "mirror"
        u, x = _primal(item, 1.0 if is_mirror else item.next_beta)
        item.param.copy_(item.scale * (_rounded(item, u, x) if item.rounded else x))


def _update_values(item: MirrorItem, g: Tensor) -> None:
    """One step of the stored value [planes, elements] along the gradient by the projected x."""
    value = item.value
    assert value is not None
    levels = _levels(item, g)
    softmax = PROJECTIONS[item.projection] == "softmax"
    update = UPDATES[item.update]
    if update == "jacobian":
        u, x = _primal(item, item.beta)
        if softmax:
            slopes = item.beta * u * (levels - x)
        elif item.levels == 2:
            slopes = (item.beta * ((1 - x) * (1 + x)))[None]
        else:
            slopes = item.beta * (1 - u.square()).sum(0, keepdim=True) / 2
        for plane, slope in enumerate(slopes):
            value[plane] -= item.rate * _direction(item, g * slope, plane)
        return
    d = _direction(item, g, 0)
    if update == "dual":
        value -= item.rate * (levels * d if softmax else d)
        if PROJECTIONS[item.projection] == "sign":
            value.clamp_(-1, 1)
    elif softmax:
        turn = -levels * (item.beta * item.rate * d).clamp(-1e30, 1e30)
        turn = turn - turn.where(value > 0, turn.new_tensor(-torch.inf)).amax(0)
        grown = value * torch.where(value > 0, turn.exp(), 0)
        value.copy_(grown / grown.sum(0))
    else:
        ratio = (1 + value + 1e-20) / (1 - value + 1e-20)
        ratio = (ratio * torch.exp(-2 * item.beta * item.rate * d)).clamp(max=1e30)
        value.copy_((ratio - 1) / (ratio + 1))


def _primal(item: MirrorItem, beta: float) -> tuple[Tensor, Tensor]:
    """u and x of the stored value: the weights of the levels, or the two steps of a ternary tanh,
    and what they come to."""
    value = item.value
    assert value is not None
    kind, mirror = PROJECTIONS[item.projection], UPDATES[item.update] == "mirror"
    if kind == "softmax":
        u = value
        if not mirror:
            u = (beta * (value - value.amax(0))).exp()
            u = u / u.sum(0)
        return u, u[-1] - u[0]
    v = value[0]
    if mirror:
        return value, v
    if item.levels == 2:
        x = (beta * v).tanh() if kind == "tanh" else torch.where(v >= 0, 1.0, -1.0).to(v.dtype)
        return x[None], x
    if kind == "sign":
        x = (v > 0.5).to(v.dtype) - (v < -0.5).to(v.dtype)
        return x[None], x
    u = torch.stack(((beta * (v + 0.5)).tanh(), (beta * (v - 0.5)).tanh()))
    return u, (u[0] + u[1]) / 2


def _levels(item: MirrorItem, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, item.levels, dtype=like.dtype, device=like.device)[:, None]


def _rounded(item: MirrorItem, u: Tensor, x: Tensor) -> Tensor:
    """The level that is nearest, or for a softmax that of the greatest weight."""
    up, down = x > 0.5, x < -0.5
    if item.levels == 2:
        up = u[1] >= u[0] if PROJECTIONS[item.projection] == "softmax" else x >= 0
        down = ~up
    elif PROJECTIONS[item.projection] == "softmax":
        moved = u[1] < torch.maximum(u[0], u[2])
        up = moved & (u[2] >= u[0])
        down = moved & ~up
    return up.to(x.dtype) - down.to(x.dtype)


def _direction(item: MirrorItem, g: Tensor, plane: int) -> Tensor:
    """The gradient, its momentum, or Adam's m / (√v + ε); `rate` holds the bias corrections."""
    kind = DIRECTIONS[item.direction]
    if kind == "gradient":
        return g
    assert item.first is not None
    m = item.first[plane]
    if kind == "momentum":
        return m.mul_(item.decay).add_(g)
    assert item.second is not None
    v = item.second[plane]
    m.mul_(item.decay).add_((1 - item.decay) * g)
    v.mul_(item.decay2).add_((1 - item.decay2) * g * g)
    return m / (v.sqrt() + item.eps)


def random_signs(seed: int, stream: int, like: Tensor) -> Tensor:
    """1 and -1 for the elements of a vector `like`, as csrc/common/philox.h defines them."""
    blocks = torch.arange(-(-len(like) // 128), device=like.device)
    zeros = torch.zeros_like(blocks)
    bits = philox4x32((blocks & 0xFFFFFFFF, blocks >> 32, zeros + stream, zeros), seed)
    minus = bits[:, :, None] >> torch.arange(32, device=like.device) & 1
    return 1 - 2 * minus.flatten()[: len(like)].to(like.dtype)


def philox4x32(counter: Sequence[Tensor], key: int) -> Tensor:
    """Philox4x32-10: four words [N] of 32 bits, held in int64, to as many random ones, [N, 4]."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2**64: the bits of the product
        a, b = q >> 32 & 0xFFFFFFFF ^ b ^ low, q & 0xFFFFFFFF
        c, d = p >> 32 & 0xFFFFFFFF ^ d ^ high, p & 0xFFFFFFFF
        low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
    return torch.stack((a, b, c, d), -1)


def _widened(*tensors: Tensor) -> list[Tensor]:
    """The elements in the order they are stored, in the dtype of their sums."""
    return [t.to(accumulator(t.dtype)).reshape(-1) for t in tensors]


def _write_sums(item: ParameterItem, *terms: Tensor) -> None:
    """Sum what each sum adds, elements in the order they are stored, into the item's outputs."""
    extents = (item.groups, item.rows // item.groups, item.channels, item.kernel)
    if item.channels_last:
        extents = (*extents[:2], item.kernel, item.channels)
    blocks = torch.stack(terms).reshape(len(terms), *extents)
    if item.channels_last:
        blocks = blocks.transpose(3, 4)
    if item.row_out is not None:
        item.row_out.copy_(blocks.sum((3, 4)).flatten(1).T.reshape(item.row_out.shape))
    if item.col_out is not None:
        item.col_out.copy_(blocks.sum((2, 4)).flatten(1).T.reshape(item.col_out.shape))
