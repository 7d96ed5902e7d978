"""rademacher in Triton: csrc/common/rademacher.h says what it fills tensors with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.moments import WARPS, find
from taylor_kernels.backends.triton.philox import sign_bits, to_signs
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import RademacherItem

#: Elements that a program fills; 8 of them, one 16-byte store of halves, take one draw.
TILE = (512, 8)
OUT, COUNT, STREAM, FIRST = (tl.constexpr(i) for i in range(4))
FIELDS = tl.constexpr(4)


@triton.jit(do_not_specialize=["count", "seed"])
def fill_kernel(table, count, out, seed: tl.int64, DRAWS: tl.constexpr, EACH: tl.constexpr):
    item = find(table, count, FIELDS, FIRST)
    program = tl.program_id(0) - tl.load(item + FIRST)
    starts = (program * DRAWS + tl.arange(0, DRAWS)) * EACH
    bits = sign_bits(seed, tl.load(item + STREAM), starts)
    each = tl.arange(0, EACH)
    signs = to_signs(bits[:, None] >> each[None, :])
    at = starts[:, None] + each[None, :]
    to = out + tl.load(item + OUT) + at
    tl.store(to, signs.to(out.dtype.element_ty), mask=at < tl.load(item + COUNT))


def rademacher(items: Sequence[RademacherItem], seed: int) -> None:
    """Fill the outputs of all items, which share a device and dtype, with random signs."""
    base = items[0].out
    fields: list[int] = []
    programs = 0
    for item in items:
        offset = (item.out.data_ptr() - base.data_ptr()) // base.element_size()
        fields += offset, item.elements, item.stream, programs
        programs += triton.cdiv(item.elements, TILE[0] * TILE[1])
    device = base.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        table = device_table(fields, device)
        fill_kernel[(programs,)](table, len(items), base, seed, *TILE, num_warps=WARPS)
