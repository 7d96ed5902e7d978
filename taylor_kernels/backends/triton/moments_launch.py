"""The ops over lists of parameters in Triton: their launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton

from taylor_kernels.backends.triton.moments import (
    FINISH_TILE,
    PARAMETER_OPS,
    TYPES,
    WARPS,
    ParameterOp,
    constants,
    finish_kernel,
    stream_kernel,
)
from taylor_kernels.backends.triton.moments_plan import GRID, number, plan
from taylor_kernels.backends.triton.tables import device_table
from taylor_kernels.layout import ParameterItem


def run(name: str, items: Sequence[ParameterItem], seed: int = 0) -> None:
    """Write the sums of the op of PARAMETER_OPS into the outputs of all items, of one device."""
    for dtype in TYPES:
        part = [item for item in items if item.weight.dtype == dtype]
        if part:
            _run_dtype(PARAMETER_OPS[name], part, dtype, seed)


def _run_dtype(op: ParameterOp, items: list[ParameterItem], dtype: torch.dtype, seed: int) -> None:
    device = items[0].weight.device
    sums = op.sums
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
            num_warps=op.warps,
        )
        if axes:
            table = device_table([field for axis in axes for field in axis], device)
            finish_kernel[(finishing,)](
                table, len(axes), *outputs, workspace, *FINISH_TILE, sums, num_warps=WARPS
            )
