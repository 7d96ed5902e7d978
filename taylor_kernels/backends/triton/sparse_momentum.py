"""sparse_momentum in Triton: csrc/common/sparse_momentum.h says what a step is."""

from __future__ import annotations

import struct
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.global_threshold import key_of
from taylor_kernels.backends.triton.moments import TYPES, WARPS, find
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import SparseMomentumArgs

#: Elements of a program.
TILE = 1024
W, G, Z, ROWS, COUNT, ROW_COUNT, POSITION, RANKED, LR, DECAY, BETA, FIRST = (
    tl.constexpr(i) for i in range(12)
)
FIELDS = tl.constexpr(12)


@triton.jit
def _number(item, which: tl.constexpr):
    """A float32 whose bits a field holds."""
    return tl.load(item + which).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def momentum_kernel(table, count, threshold, T: tl.constexpr, TILE: tl.constexpr):
    if tl.load(threshold + 2) == 0:
        item = find(table, count, FIELDS, FIRST)
        at = (tl.program_id(0) - tl.load(item + FIRST)) * TILE + tl.arange(0, TILE)
        inside = at < tl.load(item + COUNT)
        to_w = tl.load(item + W).to(tl.pointer_type(T)) + at
        to_z = tl.load(item + Z).to(tl.pointer_type(T)) + at
        w = tl.load(to_w, mask=inside, other=0).to(tl.float32)
        z = tl.load(to_z, mask=inside, other=0).to(tl.float32)
        from_g = tl.load(item + G).to(tl.pointer_type(T)) + at
        g = tl.load(from_g, mask=inside, other=0).to(tl.float32)
        rows = tl.load(item + ROWS)
        position = at
        score = g * w
        if rows != 0:
            position = at // tl.load(item + ROW_COUNT)
            score = tl.load(rows.to(tl.pointer_type(tl.float32)) + position, mask=inside, other=0)
        position += tl.load(item + POSITION)
        key = key_of(score, False)
        last = tl.load(threshold)
        active = (key > last) | ((key == last) & (position <= tl.load(threshold + 1)))
        active |= tl.load(item + RANKED) == 0
        z = _number(item, BETA) * z + _number(item, DECAY) * w
        z = z + tl.where(active, g, 0.0)
        w = w - _number(item, LR) * z
        tl.store(to_z, z.to(T), mask=inside)
        tl.store(to_w, w.to(T), mask=inside)


def sparse_momentum(args: SparseMomentumArgs) -> None:
    """A step of all items, which share a device."""
    device = args.table.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for dtype, name in TYPES.items():
            items = [item for item in args.items if item.dtype == dtype]
            fields: list[int] = []
            programs = 0
            for item in items:
                rows = 0 if item.row_scores is None else item.row_scores.data_ptr()
                fields += item.weight.data_ptr(), item.grad.data_ptr(), item.momentum.data_ptr()
                fields += rows, item.elements, item.row_elements, item.first, item.ranked
                fields += map(_bits, (item.lr, item.decay, item.beta))
                fields += (programs,)
                programs += triton.cdiv(item.elements, TILE)
            if items:
                # Each operation is rounded on its own: nothing is fused.
                momentum_kernel[(programs,)](
                    device_table(fields, device), len(items), args.table, name, TILE,
                    num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip


def _bits(number: float) -> int:
    return int(struct.unpack("i", struct.pack("f", number))[0])
