"""filter_moments in Triton: csrc/filter_moments.h says what it computes.

One launch per dtype of a list, and a second one where results come in parts. A task is one
parameter seen as `groups` matrices [rows, length]. Where only the rows' sums are wanted, a program
takes some rows, or a segment of a long one; else a block of rows and a tile of positions, with the
partial sums of both axes kept for the second launch, which adds them in a fixed order.

Bits depend on a parameter's shape and on whether it starts at a 16-byte address.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import ParameterItem

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WARPS = 4
#: Tiles [rows, positions] of 2048 elements, 16 for each thread: for rows longer than the third
#: column says, the first that fits. The last is for grids.
TILES = ((1, 2048, 2048), (8, 256, 128), (64, 32, 8), (512, 4, 0))
GRID_TILE = (16, 128)
GRID = len(TILES)  # the kind of a grid task; a rows task's is its tile
#: Positions in a segment of a long row, and rows in a block of a grid: enough that the partial
#: sums stay a few percent of what is read.
SEGMENT = 16 * 2048
BLOCK_ROWS = 256
#: The second launch adds up [parts, results] at once.
FINISH_TILE = (32, 16)

W, G, ROWS, LENGTH, GROUPS, KIND, FAST = (tl.constexpr(i) for i in range(7))
ROW_BLOCKS, TILE_COUNT, ROW_OUT, COL_OUT = (tl.constexpr(i) for i in range(7, 11))
ROW_PARTS, COL_PARTS, FIRST = (tl.constexpr(i) for i in range(11, 14))
FIELDS = tl.constexpr(14)
AXIS_FIELDS = tl.constexpr(8)


class Task(NamedTuple):
    """A row of the device table; offsets count floats, -1 means none."""

    w: int
    g: int
    rows: int  # of a group
    length: int
    groups: int
    kind: int
    fast: int  # 16-byte loads are possible
    row_blocks: int
    tiles: int
    row_out: int = -1
    col_out: int = -1
    row_parts: int = -1
    col_parts: int = -1
    first: int = 0  # program


class Axis(NamedTuple):
    """Results that come in parts: partials [groups, parts, 5, entries * run]."""

    partials: int
    out: int
    to_rows: int
    groups: int
    entries: int
    parts: int
    run: int
    first: int = 0


@triton.jit
def _find(table, count, fields: tl.constexpr, first: tl.constexpr):
    """The last row of the table that starts at or before this program."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * fields + first) <= tl.program_id(0)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table + low * fields


@triton.jit
def _load(task, row, rows, column, end, fast, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """A tile of w and g in float32; zeros outside of `rows` and `end`."""
    length = tl.load(task + LENGTH)
    r = row + tl.arange(0, R)
    c = column + tl.arange(0, C)
    w = tl.load(task + W).to(tl.pointer_type(T))
    g = tl.load(task + G).to(tl.pointer_type(T))
    if fast & (row + R <= rows) & (column + C <= end):
        # The compiler cannot see through the table how these addresses are aligned.
        at = r[:, None] * length + c[None, :]
        w_at = tl.multiple_of(tl.max_contiguous(w + at, (1, C)), (16, 16))
        g_at = tl.multiple_of(tl.max_contiguous(g + at, (1, C)), (16, 16))
        w_tile = tl.load(w_at).to(tl.float32)
        g_tile = tl.load(g_at).to(tl.float32)
    else:
        at = r[:, None] * length + c[None, :]
        mask = (r[:, None] < rows) & (c[None, :] < end)
        w_tile = tl.load(w + at, mask=mask, other=0).to(tl.float32)
        g_tile = tl.load(g + at, mask=mask, other=0).to(tl.float32)
    return w_tile, g_tile


@triton.jit
def _store_rows(task, out, workspace, group, tile, r, mask, s0, s1, s2, s3, s4):
    """One sum of each moment for rows r of a group: to their place, or as a part of it."""
    rows = tl.load(task + ROWS)
    parts = tl.load(task + ROW_PARTS)
    if parts < 0:
        at = out + (group * rows + r) * 5
        step = rows * 0 + 1
    else:
        part = group * tl.load(task + TILE_COUNT) + tile
        at = workspace + parts + part * 5 * rows + r
        step = rows
    tl.store(at, s0, mask=mask)
    tl.store(at + step, s1, mask=mask)
    tl.store(at + 2 * step, s2, mask=mask)
    tl.store(at + 3 * step, s3, mask=mask)
    tl.store(at + 4 * step, s4, mask=mask)


@triton.jit
def _rows_task(
    task, block, row_out, col_out, workspace, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    tiles = tl.load(task + TILE_COUNT)
    tile = block % tiles
    row = block // tiles * R
    rows = tl.load(task + ROWS)
    fast = tl.load(task + FAST) != 0
    begin = tile * SEGMENT
    end = tl.minimum(begin + SEGMENT, tl.load(task + LENGTH))
    s0 = tl.zeros((R, C), tl.float32)
    s1 = tl.zeros((R, C), tl.float32)
    s2 = tl.zeros((R, C), tl.float32)
    s3 = tl.zeros((R, C), tl.float32)
    s4 = tl.zeros((R, C), tl.float32)
    for column in range(begin, end, C):
        w, g = _load(task, row, rows, column, end, fast, R, C, T)
        gw = g * w
        s0 += gw
        s1 += gw * gw
        s2 += tl.abs(gw)
        s3 += w * w
        s4 += g * g
    t0 = tl.sum(s0, 1)
    t1 = tl.sum(s1, 1)
    t2 = tl.sum(s2, 1)
    t3 = tl.sum(s3, 1)
    t4 = tl.sum(s4, 1)
    r = row + tl.arange(0, R)
    to_rows = tl.load(task + ROW_OUT)
    to_cols = tl.load(task + COL_OUT)
    if (to_rows >= 0) | (tiles > 1):
        _store_rows(
            task, row_out + to_rows, workspace, row * 0, tile, r, r < rows, t0, t1, t2, t3, t4
        )
    if (to_cols >= 0) & (tiles == 1):
        _store_rows(
            task, col_out + to_cols, workspace, row * 0, tile, r, r < rows, t0, t1, t2, t3, t4
        )


@triton.jit
def _grid_task(
    task, block, row_out, col_out, workspace, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    WITH_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
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
    s0 = tl.zeros((R, C), tl.float32)
    s1 = tl.zeros((R, C), tl.float32)
    s2 = tl.zeros((R, C), tl.float32)
    s3 = tl.zeros((R, C), tl.float32)
    s4 = tl.zeros((R, C), tl.float32)
    last = (group + 1) * rows  # rows are numbered through the groups: their matrices are adjacent
    for row in range(begin, tl.minimum(begin + BLOCK_ROWS, rows), R):
        w, g = _load(task, group * rows + row, last, column, length, fast, R, C, T)
        gw = g * w
        s0 += gw
        s1 += gw * gw
        s2 += tl.abs(gw)
        s3 += w * w
        s4 += g * g
        if WITH_ROWS:
            r = row + tl.arange(0, R)
            _store_rows(
                task, row_out + tl.load(task + ROW_OUT), workspace, group, tile, r, r < rows,
                tl.sum(gw, 1), tl.sum(gw * gw, 1), tl.sum(tl.abs(gw), 1), tl.sum(w * w, 1),
                tl.sum(g * g, 1),
            )  # fmt: skip
    part = group * row_blocks + row_block
    c = column + tl.arange(0, C)
    at = workspace + tl.load(task + COL_PARTS) + part * 5 * length + c
    tl.store(at, tl.sum(s0, 0), mask=c < length)
    tl.store(at + length, tl.sum(s1, 0), mask=c < length)
    tl.store(at + 2 * length, tl.sum(s2, 0), mask=c < length)
    tl.store(at + 3 * length, tl.sum(s3, 0), mask=c < length)
    tl.store(at + 4 * length, tl.sum(s4, 0), mask=c < length)


@triton.jit(do_not_specialize=["count"])
def stream_kernel(
    table, count, row_out, col_out, workspace, T: tl.constexpr, GRIDS: tl.constexpr,
    WITH_ROWS: tl.constexpr, TILES: tl.constexpr, GRID_TILE: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The only pass over the inputs."""
    task = _find(table, count, FIELDS, FIRST)
    block = tl.program_id(0) - tl.load(task + FIRST)
    kind = tl.load(task + KIND)
    for i in tl.static_range(len(TILES)):
        if kind == i:
            _rows_task(
                task, block, row_out, col_out, workspace, TILES[i][0], TILES[i][1], T, SEGMENT
            )
    if GRIDS:  # noqa: SIM102 - at compile time, the next one at run time
        if kind == len(TILES):
            _grid_task(
                task, block, row_out, col_out, workspace, GRID_TILE[0], GRID_TILE[1], T,
                WITH_ROWS, BLOCK_ROWS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def finish_kernel(table, count, row_out, col_out, workspace, P: tl.constexpr, E: tl.constexpr):
    """Adds the parts of one moment of E results."""
    axis = _find(table, count, AXIS_FIELDS, 7)
    block = tl.program_id(0) - tl.load(axis + 7)
    partials = workspace + tl.load(axis)
    entries = tl.load(axis + 4)
    parts = tl.load(axis + 5)
    run = tl.load(axis + 6)
    blocks = tl.cdiv(entries, E)
    moment = block // blocks % 5
    group = block // blocks // 5
    entry = block % blocks * E + tl.arange(0, E)
    sums = tl.zeros((P, E), tl.float32)
    for start in range(0, parts * run, P):
        i = start + tl.arange(0, P)
        at = ((group * parts + i // run) * 5 + moment)[:, None] * (entries * run)
        at += entry[None, :] * run + (i % run)[:, None]
        mask = (i < parts * run)[:, None] & (entry < entries)[None, :]
        sums += tl.load(partials + at, mask=mask, other=0)
    to = tl.load(axis + 1) + (group * entries + entry) * 5 + moment
    out = col_out
    if tl.load(axis + 2) != 0:
        out = row_out
    tl.store(out + to, tl.sum(sums, 0), mask=entry < entries)


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items, which share a device, into their outputs."""
    for dtype in TYPES:
        part = [item for item in items if item.weight.dtype == dtype]
        if part:
            _filter_moments(part, dtype)


def _filter_moments(items: list[ParameterItem], dtype: torch.dtype) -> None:
    device = items[0].weight.device
    row_base = next((item.row_out for item in items if item.row_out is not None), None)
    col_base = next((item.col_out for item in items if item.col_out is not None), None)
    tasks, axes, floats = plan(items, row_base, col_base)

    programs = _number(tasks, (task.groups * task.row_blocks * task.tiles for task in tasks))
    per_finish = FINISH_TILE[1]
    finishing = _number(axes, (a.groups * 5 * triton.cdiv(a.entries, per_finish) for a in axes))
    grids = any(task.kind == GRID for task in tasks)
    workspace = torch.empty(max(floats, 1), dtype=torch.float32, device=device)
    outputs = [workspace if base is None else base for base in (row_base, col_base)]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        table = device_table([field for task in tasks for field in task], device)
        stream_kernel[(programs,)](
            table,
            len(tasks),
            *outputs,
            workspace,
            T=TYPES[dtype],
            GRIDS=grids,
            WITH_ROWS=grids and row_base is not None,
            TILES=tuple(tile[:2] for tile in TILES),
            GRID_TILE=GRID_TILE,
            SEGMENT=SEGMENT,
            BLOCK_ROWS=BLOCK_ROWS,
            num_warps=WARPS,
        )
        if axes:
            table = device_table([field for axis in axes for field in axis], device)
            finish_kernel[(finishing,)](
                table, len(axes), *outputs, workspace, *FINISH_TILE, num_warps=WARPS
            )


def plan(
    items: Iterable[ParameterItem], row_base: Tensor | None, col_base: Tensor | None
) -> tuple[list[Task], list[Axis], int]:
    """The tasks, the axes to finish, and how many floats of partial sums lie between the two."""
    tasks: list[Task] = []
    axes: list[Axis] = []
    floats = 0
    for item in items:
        group_rows, filter_size = item.rows // item.groups, item.channels * item.kernel
        depthwise = item.channels == 1 and (group_rows == 1 or item.row_out is None)
        row_out = -1 if item.row_out is None else _offset(item.row_out, row_base)
        col_out = -1 if item.col_out is None else _offset(item.col_out, col_base)
        if item.col_out is None or depthwise:  # a column is as contiguous as a row
            rows = item.rows if item.col_out is None else item.groups
            task = _task(item, 1, rows, item.rows * filter_size // rows)
            kind = next(i for i, tile in enumerate(TILES) if task.length > tile[2])
            task = task._replace(
                kind=kind,
                row_blocks=triton.cdiv(rows, TILES[kind][0]),
                tiles=triton.cdiv(task.length, SEGMENT),
                row_out=row_out,
                col_out=col_out,
            )
            if task.tiles > 1:
                for out, to_rows in ((row_out, 1), (col_out, 0)):
                    if out >= 0:
                        axes.append(Axis(floats, out, to_rows, 1, rows, task.tiles, 1))
                task = task._replace(row_parts=floats)
                floats += 5 * rows * task.tiles
        else:
            row_run = item.kernel if item.channels_last else 1
            task = _task(item, item.groups, group_rows * row_run, filter_size // row_run)
            task = task._replace(
                kind=GRID,
                row_blocks=triton.cdiv(task.rows, BLOCK_ROWS),
                tiles=triton.cdiv(task.length, GRID_TILE[1]),
                row_out=row_out,
                col_out=col_out,
                col_parts=floats,
            )
            parts = (task.row_blocks, item.kernel // row_run)
            axes.append(Axis(floats, col_out, 0, item.groups, item.channels, *parts))
            floats += 5 * item.groups * task.row_blocks * task.length
            if item.row_out is not None and (task.tiles > 1 or row_run > 1):
                axes.append(Axis(floats, row_out, 1, item.groups, group_rows, task.tiles, row_run))
                task = task._replace(row_parts=floats)
                floats += 5 * item.groups * task.tiles * task.rows
        tasks.append(task)
    return tasks, axes, floats


def _task(item: ParameterItem, groups: int, rows: int, length: int) -> Task:
    pointers = item.weight.data_ptr(), item.grad.data_ptr()
    fast = all(p % 16 == 0 for p in pointers) and length % 8 == 0
    return Task(*pointers, rows, length, groups, 0, int(fast), 1, 1)


def _offset(out: Tensor, base: Tensor | None) -> int:
    """In floats; outputs are addressed from the first, so a table survives their reallocation."""
    assert base is not None
    return (out.data_ptr() - base.data_ptr()) // 4


def _number(rows: list, programs: Iterable[int]) -> int:
    """Gives every row of a table its first program; returns how many there are."""
    total = 0
    for i, count in enumerate(programs):
        rows[i] = rows[i]._replace(first=total)
        total += count
    return total
