"""filter_moments, second_order_moments and hutchinson_moments in Triton: their launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.moments import (
    FILTER,
    FINISH_TILE,
    HUTCHINSON,
    OP_WARPS,
    SECOND_ORDER,
    SUMS,
    TYPES,
    WARPS,
    constants,
    finish_kernel,
    stream_kernel,
)
from taylor_kernels.backends.triton.moments_plan import GRID, number, plan
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import ParameterItem


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items, which share a device, into their outputs."""
    _run(FILTER, items)


def second_order_moments(items: Sequence[ParameterItem]) -> None:
    """Write (Σ q, Σ q²) of all items, which share a device, into their outputs."""
    _run(SECOND_ORDER, items)


def hutchinson_moments(items: Sequence[ParameterItem], seed: int) -> None:
    """Write Σ w² z (Hz) of all items, which share a device, into their outputs."""
    _run(HUTCHINSON, items, seed)


def _run(op: tl.constexpr, items: Sequence[ParameterItem], seed: int = 0) -> None:
    """Write the op's sums of all items, which share a device, into their outputs."""
    for dtype in TYPES:
        part = [item for item in items if item.weight.dtype == dtype]
        if part:
            _run_dtype(op, part, dtype, seed)


def _run_dtype(op: tl.constexpr, items: list[ParameterItem], dtype: torch.dtype, seed: int) -> None:
    device = items[0].weight.device
    sums = SUMS[op.value]
    row_base = next((item.row_out for item in items if item.row_out is not None), None)
    col_base = next((item.col_out for item in items if item.col_out is not None), None)
    tasks, axes, floats = plan(items, sums, row_base, col_base)

    programs = number(tasks, (task.groups * task.row_blocks * task.tiles for task in tasks))
    per_finish = FINISH_TILE[1]
    finishing = number(axes, (a.groups * sums * triton.cdiv(a.entries, per_finish) for a in axes))
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
            seed,
            **constants(op, dtype, grids, row_base is not None),
            num_warps=OP_WARPS[op.value],
        )
        if axes:
            table = device_table([field for axis in axes for field in axis], device)
            finish_kernel[(finishing,)](
                table, len(axes), *outputs, workspace, *FINISH_TILE, sums, num_warps=WARPS
            )
