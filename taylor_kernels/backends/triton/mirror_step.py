"""mirror_step in Triton: csrc/common/mirror_step.h says what it computes.

A launch for each combination of rule, dtype and what is to be done that a list has. Values of a
level each are v0, v1 and v2; of two levels the upper one is v1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.moments import TYPES, WARPS, find
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import MirrorItem

#: Elements that a program takes.
TILE = 1024
PARAM, GRAD, VALUE, FIRST, SECOND, COUNT, ALIGNED, PLACE, PROGRAM = (
    tl.constexpr(i) for i in range(9)
)
FIELDS = tl.constexpr(9)
#: Columns of the table of numbers.
RATE, DECAY, DECAY2, EPS, BETA, NEXT_BETA, SCALE, WEIGHT_DECAY = (tl.constexpr(i) for i in range(8))
NUMBERS = tl.constexpr(8)
#: The enumerations of csrc/common/mirror_step.h.
IDENTITY, TANH, SOFTMAX, SIGN = (tl.constexpr(i) for i in range(4))
DUAL, JACOBIAN, MIRROR = (tl.constexpr(i) for i in range(3))
GRADIENT, MOMENTUM, ADAM = (tl.constexpr(i) for i in range(3))


@triton.jit
def _tanh(x):
    """Within 3 units in the last place: the polynomial of csrc/cpu/elementary.h near 0."""
    size = tl.abs(x)
    square = x * x
    q = -0.0057049864 * square + 0.0206390861
    q = q * square - 0.0537397154
    q = q * square + 0.133314416
    q = q * square - 0.333332807
    outer = 1 - 2 / (tl.exp(size + size) + 1)
    return tl.where(size < 0.625, x + x * square * q, tl.where(x < 0, -outer, outer))


@triton.jit
def _nearest(x, LEVELS: tl.constexpr):
    if LEVELS == 2:
        level = tl.where(x >= 0, 1.0, -1.0)
    else:
        level = tl.where(x > 0.5, 1.0, tl.where(x < -0.5, -1.0, 0.0))
    return level


@triton.jit
def _project(
    v0, v1, v2, beta, PROJECTION: tl.constexpr, LEVELS: tl.constexpr, UPDATE: tl.constexpr
):
    """The levels' weights, or the two steps of a ternary tanh, and x."""
    u0, u1, u2 = v0, v1, v2
    x = v0
    if PROJECTION == SOFTMAX:
        if UPDATE != MIRROR:
            most = tl.maximum(v0, v1)
            if LEVELS == 3:
                most = tl.maximum(most, v2)
            u0 = tl.exp(beta * (v0 - most))
            u1 = tl.exp(beta * (v1 - most))
            u2 = tl.exp(beta * (v2 - most))
            total = u0 + u1
            if LEVELS == 3:
                total += u2
            u0, u1, u2 = u0 / total, u1 / total, u2 / total
        x = (u1 if LEVELS == 2 else u2) - u0
    elif PROJECTION == SIGN:
        x = _nearest(v0, LEVELS)
    elif PROJECTION == TANH and UPDATE != MIRROR:
        if LEVELS == 2:
            x = _tanh(beta * v0)
        else:
            u0, u1 = _tanh(beta * (v0 + 0.5)), _tanh(beta * (v0 - 0.5))
            x = 0.5 * (u0 + u1)
    return u0, u1, u2, x


@triton.jit
def _rounded(u0, u1, u2, x, PROJECTION: tl.constexpr, LEVELS: tl.constexpr):
    if PROJECTION != SOFTMAX:
        level = _nearest(x, LEVELS)
    elif LEVELS == 2:
        level = tl.where(u1 >= u0, 1.0, -1.0)
    else:
        outer = tl.where(u2 >= u0, 1.0, -1.0)
        level = tl.where(u1 >= tl.maximum(u0, u2), 0.0, outer)
    return level


@triton.jit
def _places(item, field: tl.constexpr, plane, at, T: tl.constexpr, FAST: tl.constexpr):
    """Addresses of a tile; the compiler cannot see through the table how they are aligned."""
    to = tl.load(item + field).to(tl.pointer_type(T)) + plane * tl.load(item + COUNT) + at
    return tl.multiple_of(tl.max_contiguous(to, at.shape[0]), 16) if FAST else to


@triton.jit
def _read(item, field: tl.constexpr, plane, at, mask, T: tl.constexpr, FAST: tl.constexpr):
    place = _places(item, field, plane, at, T, FAST)
    value = tl.load(place) if FAST else tl.load(place, mask=mask, other=0)
    return value.to(tl.float32)


@triton.jit
def _write(item, field: tl.constexpr, plane, at, mask, value, T: tl.constexpr, FAST: tl.constexpr):
    place = _places(item, field, plane, at, T, FAST)
    if FAST:
        tl.store(place, value.to(T))
    else:
        tl.store(place, value.to(T), mask=mask)


@triton.jit
def _direct(item, n, g, plane, at, mask, DIRECTION: tl.constexpr, FAST: tl.constexpr):
    """d of a gradient; the moments are read and written."""
    d = g
    if DIRECTION != GRADIENT:
        decay = tl.load(n + DECAY)
        m = decay * _read(item, FIRST, plane, at, mask, tl.float32, FAST)
        m += (1 - decay) * g if DIRECTION == ADAM else g
        _write(item, FIRST, plane, at, mask, m, tl.float32, FAST)
        d = m
        if DIRECTION == ADAM:
            decay2 = tl.load(n + DECAY2)
            s = _read(item, SECOND, plane, at, mask, tl.float32, FAST)
            s = decay2 * s + (1 - decay2) * g * g
            _write(item, SECOND, plane, at, mask, s, tl.float32, FAST)
            d = m / (tl.sqrt(s) + tl.load(n + EPS))
    return d


@triton.jit
def _mirrored(v0, v1, v2, turn, PROJECTION: tl.constexpr, LEVELS: tl.constexpr):
    """The mirror forms; turn = β·rate·d. Levels that have no weight left do not count."""
    if PROJECTION == SOFTMAX:
        turn = tl.minimum(tl.maximum(turn, -1e30), 1e30)
        e0 = tl.where(v0 > 0, turn, -1e38)
        e1 = tl.where(v1 > 0, -turn if LEVELS == 2 else 0.0 * turn, -1e38)
        e2 = tl.where(v2 > 0, -turn, -1e38)
        most = tl.maximum(e0, e1)
        if LEVELS == 3:
            most = tl.maximum(most, e2)
        v0, v1, v2 = v0 * tl.exp(e0 - most), v1 * tl.exp(e1 - most), v2 * tl.exp(e2 - most)
        total = v0 + v1
        if LEVELS == 3:
            total += v2
        v0, v1, v2 = v0 / total, v1 / total, v2 / total
    else:
        e = (1 + v0 + 1e-20) / (1 - v0 + 1e-20) * tl.exp(-2 * turn)
        e = tl.minimum(e, 1e30)
        v0 = (e - 1) / (e + 1)
    return v0, v1, v2


@triton.jit
def _step(
    item, n, at, mask, T: tl.constexpr, PROJECTION: tl.constexpr, LEVELS: tl.constexpr,
    UPDATE: tl.constexpr, DIRECTION: tl.constexpr, MOVES: tl.constexpr, ROUNDED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    if PROJECTION == IDENTITY:
        v0 = _read(item, PARAM, 0, at, mask, T, FAST)
    else:
        v0 = _read(item, VALUE, 0, at, mask, tl.float32, FAST)
    v1, v2 = v0, v0
    if PROJECTION == SOFTMAX:
        v1 = _read(item, VALUE, 1, at, mask, tl.float32, FAST)
        if LEVELS == 3:
            v2 = _read(item, VALUE, 2, at, mask, tl.float32, FAST)
    scale = tl.load(n + SCALE)
    if MOVES:
        g = _read(item, GRAD, 0, at, mask, T, FAST) * scale
        rate, beta = tl.load(n + RATE), tl.load(n + BETA)
        if UPDATE == JACOBIAN:
            u0, u1, u2, x = _project(v0, v1, v2, beta, PROJECTION, LEVELS, UPDATE)
            if PROJECTION == SOFTMAX:
                middle = 1.0 if LEVELS == 2 else 0.0
                s0, s1 = beta * u0 * (-1 - x), beta * u1 * (middle - x)
                v0 -= rate * _direct(item, n, g * s0, 0, at, mask, DIRECTION, FAST)
                v1 -= rate * _direct(item, n, g * s1, 1, at, mask, DIRECTION, FAST)
                if LEVELS == 3:
                    s2 = beta * u2 * (1 - x)
                    v2 -= rate * _direct(item, n, g * s2, 2, at, mask, DIRECTION, FAST)
            else:
                slope = (1 - x) * (1 + x)
                if LEVELS == 3:
                    slope = 0.5 * ((1 - u0) * (1 + u0) + (1 - u1) * (1 + u1))
                v0 -= rate * _direct(item, n, g * (beta * slope), 0, at, mask, DIRECTION, FAST)
        else:
            if PROJECTION == IDENTITY:
                g += tl.load(n + WEIGHT_DECAY) * v0
            d = _direct(item, n, g, 0, at, mask, DIRECTION, FAST)
            if UPDATE == MIRROR:
                v0, v1, v2 = _mirrored(v0, v1, v2, beta * rate * d, PROJECTION, LEVELS)
            elif PROJECTION == SOFTMAX:
                v0 += rate * d
                if LEVELS == 2:
                    v1 -= rate * d
                else:
                    v2 -= rate * d
            else:
                v0 -= rate * d
                if PROJECTION == SIGN:
                    v0 = tl.minimum(tl.maximum(v0, -1.0), 1.0)
        if PROJECTION != IDENTITY:
            _write(item, VALUE, 0, at, mask, v0, tl.float32, FAST)
            if PROJECTION == SOFTMAX:
                _write(item, VALUE, 1, at, mask, v1, tl.float32, FAST)
                if LEVELS == 3:
                    _write(item, VALUE, 2, at, mask, v2, tl.float32, FAST)
    u0, u1, u2, x = _project(v0, v1, v2, tl.load(n + NEXT_BETA), PROJECTION, LEVELS, UPDATE)
    if ROUNDED:
        x = _rounded(u0, u1, u2, x, PROJECTION, LEVELS)
    _write(item, PARAM, 0, at, mask, scale * x, T, FAST)


@triton.jit(do_not_specialize=["count"])
def mirror_kernel(
    table, numbers, count, T: tl.constexpr, PROJECTION: tl.constexpr, LEVELS: tl.constexpr,
    UPDATE: tl.constexpr, DIRECTION: tl.constexpr, MOVES: tl.constexpr, ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    item = find(table, count, FIELDS, PROGRAM)
    n = numbers + tl.load(item + PLACE) * NUMBERS
    start = (tl.program_id(0) - tl.load(item + PROGRAM)) * TILE
    at = start + tl.arange(0, TILE)
    mask = at < tl.load(item + COUNT)
    if (start + TILE <= tl.load(item + COUNT)) & (tl.load(item + ALIGNED) != 0):
        _step(
            item, n, at, mask, T, PROJECTION, LEVELS, UPDATE, DIRECTION, MOVES, ROUNDED, True
        )  # fmt: skip
    else:
        _step(
            item, n, at, mask, T, PROJECTION, LEVELS, UPDATE, DIRECTION, MOVES, ROUNDED, False
        )  # fmt: skip


def mirror_step(items: Sequence[MirrorItem]) -> None:
    """Update and project all items, which share a device, in place."""
    parts: dict[tuple[Any, ...], list[MirrorItem]] = {}
    for item in items:
        kind = item.projection, item.levels, item.update, item.direction
        parts.setdefault((item.dtype, *kind, item.grad is not None, item.rounded), []).append(item)
    for (dtype, *constants), part in parts.items():
        fields: list[int] = []
        programs = 0
        for place, item in enumerate(part):
            tensors = (item.param, item.grad, item.value, item.first, item.second)
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            # Planes follow each other, so each starts aligned only if their size says so.
            aligned = item.elements % 8 == 0 and all(each % 16 == 0 for each in addresses)
            fields += *addresses, item.elements, aligned, place, programs
            programs += triton.cdiv(item.elements, TILE)
        device = part[0].param.device
        numbers = torch.tensor([item[12:] for item in part], dtype=torch.float32, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            table = device_table(fields, device)
            mirror_kernel[(programs,)](
                table, numbers, len(part), TYPES[dtype], *constants, TILE, num_warps=WARPS
            )
