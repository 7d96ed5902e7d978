"""global_threshold in Triton: csrc/common/global_threshold.h says what is found.

A launch for each digit and dtype counts into int64 bins, and one program picks the digit. Counts
are integers, so that the order of programs changes nothing; the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from taylor_kernels.backends.triton.moments import TYPES, WARPS, find, find_for
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import GlobalThresholdArgs, ScoreItem

#: Elements that a program takes, and how many of them at once; ties that are summed at once.
CHUNK, TILE, TIES = 1 << 14, 2048, 1024
BINS = tl.constexpr(2048)
#: Of a row of the table of items. RANK is the item's place, counted from the end.
A, B, COUNT, POSITION, RANK, RANKED, FIRST = (tl.constexpr(i) for i in range(7))
FIELDS = tl.constexpr(7)
#: Of the search: how many are left to find among those of the prefix, how many these are.
LEFT, FOUND, PREFIX = (tl.constexpr(i) for i in range(3))
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def score(item, at, mask, T: tl.constexpr):
    """float32 scores of an item's elements; of one that is not ranked, what is looked at."""
    a = tl.load(item + A)
    b = tl.load(item + B)
    ranked = tl.load(item + RANKED) != 0
    first = tl.where(ranked | (b == 0), a, b).to(tl.pointer_type(T))
    values = tl.load(first + at, mask=mask, other=0).to(tl.float32)
    if ranked & (b != 0):
        values *= tl.load(b.to(tl.pointer_type(T)) + at, mask=mask, other=0).to(tl.float32)
    return values


@triton.jit
def key_of(score, SIGNED: tl.constexpr):
    """int64 keys below 2**32."""
    if SIGNED:
        bits = (score + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    else:
        return (score.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)


@triton.jit
def digit_kernel(
    table, count, bins, state, out, T: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr,
    ABOVE: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    item = find(table, count, FIELDS, FIRST)
    begin = (tl.program_id(0) - tl.load(item + FIRST)) * CHUNK
    size = tl.load(item + COUNT)
    ranked = tl.load(item + RANKED) != 0
    prefix = tl.load(state + PREFIX)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    most = tl.zeros((TILE,), dtype=tl.int32)
    for start in range(0, CHUNK, TILE):
        at = begin + start + tl.arange(0, TILE)
        inside = at < size
        values = score(item, at, inside, T)
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        key = key_of(values, SIGNED)
        wanted = inside & ranked & ((key & ABOVE) == prefix)
        digit = ((key >> SHIFT) & MASK).to(tl.int32)
        counts += tl.histogram(digit, BINS, mask=wanted)
    bin_at = bins + tl.arange(0, BINS)
    tl.atomic_add(bin_at, counts.to(tl.int64), mask=counts > 0)
    if ABOVE == 0:
        broken = tl.max(most, 0) >= INFINITY
        tl.atomic_max(out + 2, tl.load(item + RANK), mask=broken)


@triton.jit
def pick_kernel(bins, state, out, SHIFT: tl.constexpr):
    """One program: the greatest digit that as many scores as are left reach."""
    digit = tl.arange(0, BINS)
    counts = tl.load(bins + digit)
    reached = tl.cumsum(counts, 0, reverse=True)
    left = tl.load(state + LEFT)
    best = tl.max(tl.where(reached >= left, digit, 0), 0)
    here = digit == best
    tl.store(state + LEFT, left - tl.sum(tl.where(here, reached - counts, 0), 0))
    tl.store(state + FOUND, tl.sum(tl.where(here, counts, 0), 0))
    prefix = tl.load(state + PREFIX) | (best.to(tl.int64) << SHIFT)
    tl.store(state + PREFIX, prefix)
    tl.store(out, prefix)
    tl.store(out + 1, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def ties_kernel(
    table, count, state, ties,
    T: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many scores of each program's chunk are equal to the last one, if some are left out."""
    if tl.load(state + LEFT) < tl.load(state + FOUND):
        item = find(table, count, FIELDS, FIRST)
        begin = (tl.program_id(0) - tl.load(item + FIRST)) * CHUNK
        size = tl.load(item + COUNT)
        key = tl.load(state + PREFIX)
        found = tl.zeros((TILE,), dtype=tl.int64)
        if tl.load(item + RANKED) != 0:
            for start in range(0, CHUNK, TILE):
                at = begin + start + tl.arange(0, TILE)
                inside = at < size
                same = inside & (key_of(score(item, at, inside, T), SIGNED) == key)
                found += same.to(tl.int64)
        tl.store(ties + tl.program_id(0), tl.sum(found, 0))


@triton.jit
def locate_kernel(
    table, count, state, ties, chunks, first, mine, out,
    T: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    TIES: tl.constexpr,
):  # fmt: skip
    """One program: the position of the last of the equal scores that are chosen, if it lies in one
    of `mine` chunks from `first` on, of all `chunks`."""
    left = tl.load(state + LEFT)
    if left < tl.load(state + FOUND):
        before = left * 0
        chunk = left * 0
        rest = left * 0
        for start in range(0, chunks, TIES):
            at = start + tl.arange(0, TIES)
            each = tl.load(ties + at, mask=at < chunks, other=0)
            sums = before + tl.cumsum(each, 0)
            here = (sums >= left) & (sums - each < left)
            chunk += tl.sum(tl.where(here, at, 0), 0)
            rest += tl.sum(tl.where(here, left - sums + each, 0), 0)
            before += tl.sum(each, 0)
        if (chunk >= first) & (chunk < first + mine):
            item = find_for(chunk - first, table, count, FIELDS, FIRST)
            begin = (chunk - first - tl.load(item + FIRST)) * CHUNK
            size = tl.load(item + COUNT)
            key = tl.load(state + PREFIX)
            position = tl.load(item + POSITION)
            seen = left * 0
            for start in range(0, CHUNK, TILE):
                at = begin + start + tl.arange(0, TILE)
                inside = at < size
                same = (inside & (key_of(score(item, at, inside, T), SIGNED) == key)).to(tl.int64)
                sums = seen + tl.cumsum(same, 0)
                tl.store(out + 1 + at * 0, position + at, mask=(same > 0) & (sums == rest))
                seen += tl.sum(same, 0)


class _Part(NamedTuple):
    """The items of one dtype: their table, and their chunks among those of all parts."""

    dtype: tl.dtype
    table: Tensor
    items: int
    first: int
    chunks: int


def global_threshold(args: GlobalThresholdArgs) -> None:
    """Write the table that tells the greatest scores of all items, which share a device."""
    device = args.table.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        parts = list(_parts(args.items, device))
        chunks = sum(part.chunks for part in parts)
        bins = torch.zeros(3, BINS.value, dtype=torch.int64, device=device)
        state = torch.zeros(3, dtype=torch.int64, device=device)
        ties = torch.zeros(chunks, dtype=torch.int64, device=device)
        state[LEFT.value].fill_(args.wanted)
        args.table.zero_()
        for digit, (shift, mask) in enumerate(((21, 2047), (10, 2047), (0, 1023))):
            above = 0 if digit == 0 else (2**32 - 1) & ~((mask + 1) * 2**shift - 1)
            for part in parts:
                digit_kernel[(part.chunks,)](
                    part.table, part.items, bins[digit], state, args.table, part.dtype,
                    shift, mask, above, args.is_signed, CHUNK, TILE, num_warps=WARPS,
                )  # fmt: skip
            pick_kernel[(1,)](bins[digit], state, args.table, shift, num_warps=WARPS)
        for part in parts:
            ties_kernel[(part.chunks,)](
                part.table, part.items, state, ties[part.first :], part.dtype,
                args.is_signed, CHUNK, TILE, num_warps=WARPS,
            )  # fmt: skip
        for part in parts:
            locate_kernel[(1,)](
                part.table, part.items, state, ties, chunks, part.first, part.chunks, args.table,
                part.dtype, args.is_signed, CHUNK, TILE, TIES, num_warps=WARPS,
            )  # fmt: skip


def _parts(items: Sequence[ScoreItem], device: torch.device) -> Iterator[_Part]:
    """By dtype; where two have ties at the end, those of the first in the list come first.

    Chunks are numbered part by part, and positions item by item: so parts must be runs of the list.
    """
    first, position, start = 0, 0, 0
    while start < len(items):
        end = start
        fields: list[int] = []
        chunks = 0
        while end < len(items) and items[end].dtype == items[start].dtype:
            item = items[end]
            b = 0 if item.b is None else item.b.data_ptr()
            fields += (
                item.a.data_ptr(), b, item.elements, position,
                len(items) - end, item.ranked, chunks,
            )  # fmt: skip
            chunks += triton.cdiv(item.elements, CHUNK)
            position += item.elements if item.ranked else 0
            end += 1
        table = device_table(fields, device)
        yield _Part(TYPES[items[start].dtype], table, end - start, first, chunks)
        first += chunks
        start = end
