"""How the Triton kernels cut a list of parameters into tasks (moments_launch.py runs them).

A task is one parameter seen as `groups` matrices [rows, length]. Where only the rows' sums are
wanted, a program takes some rows, or a segment of a long one; else a block of rows and a tile of
positions, with the partial sums of both axes kept for a second launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from taylor_kernels.layout import ParameterItem

#: Tiles [rows, positions] of 2048 elements, 16 for each thread: for rows longer than the third
#: column says, the first that fits. The last is for grids.
TILES = ((1, 2048, 2048), (8, 256, 128), (64, 32, 8), (512, 4, 0))
GRID_TILE = (16, 128)
GRID = len(TILES)  # the kind of a grid task; a rows task's is its tile
#: Positions in a segment of a long row, and rows in a block of a grid: enough that the partial
#: sums stay a few percent of what is read.
SEGMENT = 16 * 2048
BLOCK_ROWS = 256

W, G, H, ROWS, LENGTH, GROUPS, KIND, FAST = (tl.constexpr(i) for i in range(8))
ROW_BLOCKS, TILE_COUNT, ROW_OUT, COL_OUT = (tl.constexpr(i) for i in range(8, 12))
ROW_PARTS, COL_PARTS, STREAM, FIRST = (tl.constexpr(i) for i in range(12, 16))
FIELDS = tl.constexpr(16)
AXIS_FIELDS = tl.constexpr(8)


class Task(NamedTuple):
    """A row of the device table; offsets count floats, -1 means none."""

    w: int
    g: int
    h: int
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
    stream: int = 0
    first: int = 0  # program


class Axis(NamedTuple):
    """Results that come in parts: partials [groups, parts, sums, entries * run]."""

    partials: int
    out: int
    to_rows: int
    groups: int
    entries: int
    parts: int
    run: int
    first: int = 0


def plan(
    items: Iterable[ParameterItem], sums: int, row_base: Tensor | None, col_base: Tensor | None
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
                floats += sums * rows * task.tiles
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
            floats += sums * item.groups * task.row_blocks * task.length
            if item.row_out is not None and (task.tiles > 1 or row_run > 1):
                axes.append(Axis(floats, row_out, 1, item.groups, group_rows, task.tiles, row_run))
                task = task._replace(row_parts=floats)
                floats += sums * item.groups * task.tiles * task.rows
        tasks.append(task)
    return tasks, axes, floats


def _task(item: ParameterItem, groups: int, rows: int, length: int) -> Task:
    operands = [t.data_ptr() for t in (item.weight, item.grad, item.hvp) if t is not None]
    pointers = operands[0], operands[1], operands[2] if len(operands) > 2 else 0
    fast = all(p % 16 == 0 for p in pointers) and length % 8 == 0
    return Task(*pointers, rows, length, groups, 0, int(fast), 1, 1, stream=item.stream)


def _offset(out: Tensor, base: Tensor | None) -> int:
    """In floats; outputs are addressed from the first, so a table survives their reallocation."""
    assert base is not None
    return (out.data_ptr() - base.data_ptr()) // 4


def number(rows: list, programs: Iterable[int]) -> int:
    """Gives every row of a table its first program; returns how many there are."""
    total = 0
    for i, count in enumerate(programs):
        rows[i] = rows[i]._replace(first=total)
        total += count
    return total
