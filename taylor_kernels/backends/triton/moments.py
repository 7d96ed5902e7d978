"""The ops over lists of parameters in Triton: csrc/common/ops.h says what they compute.

One launch per dtype of a list, and a second one where results come in parts, which adds them in a
fixed order; moments_plan.py cuts the list, moments_launch.py runs it. The ops differ in what stands
for the gradient and in which sums are kept.

Bits depend on a parameter's shape and on whether it starts at a 16-byte address.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.moments_plan import (
    AXIS_FIELDS,
    BLOCK_ROWS,
    COL_OUT,
    COL_PARTS,
    FAST,
    FIELDS,
    FIRST,
    GRID_TILE,
    KIND,
    LENGTH,
    ROW_BLOCKS,
    ROW_OUT,
    ROW_PARTS,
    ROWS,
    SEGMENT,
    STREAM,
    TILE_COUNT,
    TILES,
    G,
    H,
    W,
)
from taylor_kernels.backends.triton.philox import sign_bits, to_signs

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WARPS = 4
#: The second launch adds up [parts, results] at once.
FINISH_TILE = (32, 16)

FILTER, SECOND_ORDER, HUTCHINSON = (tl.constexpr(i) for i in range(3))


class ParameterOp(NamedTuple):
    """What the kernels are compiled for: the op's number for `_terms`, its sums, and its warps."""

    number: tl.constexpr
    sums: int
    warps: int = WARPS


PARAMETER_OPS = {
    "filter_moments": ParameterOp(FILTER, sums=5),
    "second_order_moments": ParameterOp(SECOND_ORDER, sums=2),
    "hutchinson_moments": ParameterOp(HUTCHINSON, sums=1, warps=2 * WARPS),  # draws need registers
}


@triton.jit
def find(table, count, fields: tl.constexpr, first: tl.constexpr):
    """The last row of the table that starts at or before this program."""
    return find_for(tl.program_id(0), table, count, fields, first)


@triton.jit
def find_for(program, table, count, fields: tl.constexpr, first: tl.constexpr):
    """The last row that starts at or before `program`."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * fields + first) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table + low * fields


@triton.jit
def _read(task, which: tl.constexpr, at, mask, T: tl.constexpr, FAST: tl.constexpr):
    """A tile of one of the task's tensors in float32; zeros where masked."""
    base = tl.load(task + which).to(tl.pointer_type(T))
    if FAST:
        # The compiler cannot see through the table how these addresses are aligned.
        return tl.load(tl.multiple_of(tl.max_contiguous(base + at, (1, at.shape[1])), (16, 16))).to(
            tl.float32
        )
    else:
        return tl.load(base + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _signs(task, seed, at, R: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):
    """The random signs of a tile of elements; `at` numbers them as they are stored."""
    stream = tl.load(task + STREAM)
    if ALIGNED:  # rows start at multiples of 8: 8 elements take one draw
        N: tl.constexpr = min(C, 8)
        starts = tl.min(tl.reshape(at, (R, C // N, N)), 2)
        bits = sign_bits(seed, stream, starts)[:, :, None] >> tl.arange(0, N)[None, None, :]
        return to_signs(tl.reshape(bits, (R, C)))
    else:
        return to_signs(sign_bits(seed, stream, at))


@triton.jit
def _tile(task, at, mask, T: tl.constexpr, OP: tl.constexpr, FAST: tl.constexpr):
    """w, and what stands for the gradient but for random signs."""
    w = _read(task, W, at, mask, T, FAST)
    g = _read(task, G, at, mask, T, FAST)
    if OP == SECOND_ORDER:
        g -= 0.5 * _read(task, H, at, mask, T, FAST)
    return w, g


@triton.jit
def _terms(
    task, seed, row, rows, column, end, fast, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    OP: tl.constexpr,
):  # fmt: skip
    """What the op's sums add for a tile of elements, a tuple; zeros outside of `rows` and `end`."""
    r = row + tl.arange(0, R)
    c = column + tl.arange(0, C)
    at = r[:, None] * tl.load(task + LENGTH) + c[None, :]
    mask = (r[:, None] < rows) & (c[None, :] < end)
    if fast & (row + R <= rows) & (column + C <= end):
        w, g = _tile(task, at, mask, T, OP, True)
    else:
        w, g = _tile(task, at, mask, T, OP, False)
    if OP == HUTCHINSON:
        signs = _signs(task, seed, at, R, C, True) if fast else _signs(task, seed, at, R, C, False)
        g *= signs * w
    gw = g * w
    if OP == FILTER:
        return gw, gw * gw, tl.abs(gw), w * w, g * g
    elif OP == SECOND_ORDER:
        return gw, gw * gw
    else:
        return (gw,)


@triton.jit
def _add(a, b):
    sums = ()
    for i in tl.static_range(len(a)):
        sums = sums + (a[i] + b[i],)  # noqa: RUF005 - Triton cannot unpack
    return sums


@triton.jit
def _along(tiles, axis: tl.constexpr):
    return tl.tuple([tl.sum(tile, axis) for tile in tiles])


@triton.jit
def _store_rows(task, out, workspace, group, tile, r, mask, sums):
    """The sums of rows r of a group: to their place, or as a part of it."""
    rows = tl.load(task + ROWS)
    parts = tl.load(task + ROW_PARTS)
    if parts < 0:
        at = out + (group * rows + r) * len(sums)
        step = rows * 0 + 1
    else:
        part = group * tl.load(task + TILE_COUNT) + tile
        at = workspace + parts + part * len(sums) * rows + r
        step = rows
    for i in tl.static_range(len(sums)):
        tl.store(at + i * step, sums[i], mask=mask)


@triton.jit
def _rows_task(
    task, block, row_out, col_out, workspace, seed, R: tl.constexpr, C: tl.constexpr,
    T: tl.constexpr, SEGMENT: tl.constexpr, OP: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    tiles = tl.load(task + TILE_COUNT)
    tile = block % tiles
    row = block // tiles * R
    rows = tl.load(task + ROWS)
    fast = tl.load(task + FAST) != 0
    begin = tile * SEGMENT
    end = tl.minimum(begin + SEGMENT, tl.load(task + LENGTH))
    sums = (tl.zeros((R, C), tl.float32),) * SUMS
    for column in range(begin, end, C):
        sums = _add(sums, _terms(task, seed, row, rows, column, end, fast, R, C, T, OP))
    totals = _along(sums, 1)
    r = row + tl.arange(0, R)
    to_rows = tl.load(task + ROW_OUT)
    to_cols = tl.load(task + COL_OUT)
    if (to_rows >= 0) | (tiles > 1):
        _store_rows(task, row_out + to_rows, workspace, row * 0, tile, r, r < rows, totals)
    if (to_cols >= 0) & (tiles == 1):
        _store_rows(task, col_out + to_cols, workspace, row * 0, tile, r, r < rows, totals)


@triton.jit
def _grid_task(
    task, block, row_out, col_out, workspace, seed, R: tl.constexpr, C: tl.constexpr,
    T: tl.constexpr, WITH_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, OP: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    tiles = tl.load(task + TILE_COUNT)
    row_blocks = tl.load(task + ROW_BLOCKS)
    tile = block % tiles
    row_block = block // tiles % row_blocks
    group = block // tiles // row_blocks
    rows = tl.load(task + ROWS)
    length = tl.load(task + LENGTH)
    fast = tl.load(task + FAST) != 0
    begin = row_block * BLOCK_ROWS
    column = tile * C
    sums = (tl.zeros((R, C), tl.float32),) * SUMS
    last = (group + 1) * rows  # rows are numbered through the groups: their matrices are adjacent
    for row in range(begin, tl.minimum(begin + BLOCK_ROWS, rows), R):
        terms = _terms(task, seed, group * rows + row, last, column, length, fast, R, C, T, OP)
        sums = _add(sums, terms)
        if WITH_ROWS:
            r = row + tl.arange(0, R)
            to_rows = row_out + tl.load(task + ROW_OUT)
            _store_rows(task, to_rows, workspace, group, tile, r, r < rows, _along(terms, 1))
    part = group * row_blocks + row_block
    c = column + tl.arange(0, C)
    at = workspace + tl.load(task + COL_PARTS) + part * SUMS * length + c
    totals = _along(sums, 0)
    for i in tl.static_range(SUMS):
        tl.store(at + i * length, totals[i], mask=c < length)


@triton.jit(do_not_specialize=["count", "seed"])
def stream_kernel(
    table, count, row_out, col_out, workspace, seed: tl.int64, T: tl.constexpr, OP: tl.constexpr,
    SUMS: tl.constexpr, GRIDS: tl.constexpr, WITH_ROWS: tl.constexpr, TILES: tl.constexpr,
    GRID_TILE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The only pass over the inputs."""
    task = find(table, count, FIELDS, FIRST)
    block = tl.program_id(0) - tl.load(task + FIRST)
    kind = tl.load(task + KIND)
    for i in tl.static_range(len(TILES)):
        if kind == i:
            _rows_task(
                task, block, row_out, col_out, workspace, seed, TILES[i][0], TILES[i][1], T,
                SEGMENT, OP, SUMS,
            )  # fmt: skip
    if GRIDS:  # noqa: SIM102 - at compile time, the next one at run time
        if kind == len(TILES):
            _grid_task(
                task, block, row_out, col_out, workspace, seed, GRID_TILE[0], GRID_TILE[1], T,
                WITH_ROWS, BLOCK_ROWS, OP, SUMS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    table, count, row_out, col_out, workspace, P: tl.constexpr, E: tl.constexpr, SUMS: tl.constexpr
):
    """Adds the parts of one sum of E results."""
    axis = find(table, count, AXIS_FIELDS, 7)
    block = tl.program_id(0) - tl.load(axis + 7)
    partials = workspace + tl.load(axis)
    entries = tl.load(axis + 4)
    parts = tl.load(axis + 5)
    run = tl.load(axis + 6)
    blocks = tl.cdiv(entries, E)
    which = block // blocks % SUMS
    group = block // blocks // SUMS
    entry = block % blocks * E + tl.arange(0, E)
    sums = tl.zeros((P, E), tl.float32)
    for start in range(0, parts * run, P):
        i = start + tl.arange(0, P)
        at = ((group * parts + i // run) * SUMS + which)[:, None] * (entries * run)
        at += entry[None, :] * run + (i % run)[:, None]
        mask = (i < parts * run)[:, None] & (entry < entries)[None, :]
        sums += tl.load(partials + at, mask=mask, other=0)
    to = tl.load(axis + 1) + (group * entries + entry) * SUMS + which
    out = col_out
    if tl.load(axis + 2) != 0:
        out = row_out
    tl.store(out + to, tl.sum(sums, 0), mask=entry < entries)


def constants(op: ParameterOp, dtype: torch.dtype, grids: bool, rows: bool) -> dict[str, object]:
    """What `stream_kernel` is compiled for: an op, a dtype, whether there are grids, with rows."""
    return {
        "T": TYPES[dtype],
        "OP": op.number.value,
        "SUMS": op.sums,
        "GRIDS": grids,
        "WITH_ROWS": grids and rows,
        "TILES": tuple(tile[:2] for tile in TILES),
        "GRID_TILE": GRID_TILE,
        "SEGMENT": SEGMENT,
        "BLOCK_ROWS": BLOCK_ROWS,
    }
