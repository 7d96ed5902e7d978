"""mirror_step in PyTorch, a part of the specification in reference.py.

csrc/common/mirror_step.h has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.layout import DIRECTIONS, PROJECTIONS, UPDATES, MirrorItem, accumulator


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
