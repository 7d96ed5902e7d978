"""rademacher in Triton: csrc/rademacher.h says what it fills tensors with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.moments import TYPES, WARPS, find
from taylor_kernels.backends.triton.philox import sign_bits, to_signs
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import RademacherItem

#: Elements that a program fills; 8 of them, one 16-byte store of halves, take one draw.
TILE = (512, 8)
OUT, COUNT, STREAM, FIRST = (tl.constexpr(i) for i in range(4))
FIELDS = tl.constexpr(4)


@triton.jit(do_not_specialize=["count", "seed"])
def fill_kernel(
    table, count, seed: tl.int64, T: tl.constexpr, DRAWS: tl.constexpr, EACH: tl.constexpr
):
    item = find(table, count, FIELDS, FIRST)
    program = tl.program_id(0) - tl.load(item + FIRST)
    starts = (program * DRAWS + tl.arange(0, DRAWS)) * EACH
    bits = sign_bits(seed, tl.load(item + STREAM), starts)
    each = tl.arange(0, EACH)
    signs = to_signs(bits[:, None] >> each[None, :])
    at = starts[:, None] + each[None, :]
    out = tl.load(item + OUT).to(tl.pointer_type(T))
    tl.store(out + at, signs.to(T), mask=at < tl.load(item + COUNT))


def rademacher(items: Sequence[RademacherItem], seed: int) -> None:
    """Fill the outputs of all items, which share a device, with random signs."""
    device = items[0].out.device
    for dtype, element in TYPES.items():
        fields: list[int] = []
        programs = 0
        for item in items:
            if item.out.dtype == dtype:
                fields += item.out.data_ptr(), item.out.numel(), item.stream, programs
                programs += triton.cdiv(item.out.numel(), TILE[0] * TILE[1])
        if not programs:
            continue
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            table = device_table(fields, device)
            count = len(fields) // FIELDS.value
            fill_kernel[(programs,)](table, count, seed, element, *TILE, num_warps=WARPS)
