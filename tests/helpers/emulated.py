"""The CUDA kernels on a CPU: csrc/cuda compiled against tests/backends/emulation, run in fibers.

What this proves is the logic: every element is read once, every output is written, and the bits
depend on nothing but the shape. Speed, races and real launches are for tests/gpu.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taylor_kernels.layout import ParameterItem, parameter_item
from tests.helpers import ROOT
from tests.helpers.cases import MomentsCase, filter_moments_cases

OPS = (
    "conv2d_fisher",
    "filter_moments",
    "gate_gradients",
    "hutchinson_moments",
    "rademacher",
    "second_order_moments",
)
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas")
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: Shapes that cross a limit of csrc/cuda/task_plan.h: segments of rows, blocks of rows, tiles of
#: positions.
MOMENTS_CASES = [
    *filter_moments_cases(),
    MomentsCase("segments", (2, 20011)),
    MomentsCase("segment_ends_a_vector", (1, 8192 * 2)),
    MomentsCase("row_blocks", (131, 136)),
    MomentsCase("row_blocks_and_tiles", (70, 30, 3, 3)),
    MomentsCase("few_rows_wide", (3, 150, 3, 3)),
    MomentsCase("ten_rows_wide", (10, 700)),
    MomentsCase("channels_last_blocks", (30, 40, 3, 3), layout="channels_last"),
    MomentsCase("long_runs", (5, 3, 8, 8)),
    MomentsCase("long_runs_tiles", (70, 3, 16, 16)),
    MomentsCase("many_rows_one_column", (9000, 1)),
    MomentsCase("tall", (700, 5)),
]


class ParameterStruct(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("kernel", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("row_out", ctypes.c_void_p),
        ("col_out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("stream", ctypes.c_uint32),
    ]


@cache
def kernels() -> ctypes.CDLL:
    """The launchers of tests/backends/emulation/entry.cpp; compiled once for all tests of a run."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    with tempfile.TemporaryDirectory() as name:
        # A copy of csrc/, so that a header of the emulation stands for the one of its name there.
        folder = Path(name)
        shutil.copytree(ROOT / "csrc", folder, dirs_exist_ok=True)
        emulation = ROOT / "tests" / "backends" / "emulation"
        for path in emulation.iterdir():
            shutil.copy(path, folder / "cuda" if path.name == "device.cuh" else folder)

        def compiled(source: str) -> str:
            target = f"{Path(source).stem}.o"
            command = [compiler, *FLAGS, "-I.", "-x", "c++", "-c", source, "-o", target]
            subprocess.run(command, check=True, cwd=folder)
            return target

        sources = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.cu"))]
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, [*sources, "entry.cpp"]))
        subprocess.run([compiler, "-shared", *objects, "-o", "emulated.so"], check=True, cwd=folder)
        loaded = ctypes.CDLL(str(folder / "emulated.so"))
    for op in (*OPS, "gates"):
        if hasattr(loaded, f"{op}_workspace"):
            getattr(loaded, f"{op}_workspace").restype = ctypes.c_int64
    return loaded


def poisoned(size: int) -> tuple[Tensor, ctypes.c_void_p]:
    """A workspace of so many bytes full of NaN: reading a sum that nothing wrote would show."""
    workspace = torch.full((size // 4,), float("nan"))
    return workspace, ctypes.c_void_p(workspace.data_ptr())


def run_moments(
    op: str,
    tensors: Sequence[tuple[Tensor, ...]],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    sums: int = 5,
    *seed: int,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """An op over parameters; item i of the list has the stream i."""
    outputs, items = [], []
    for i, ((weight, *others), n) in enumerate(zip(tensors, groups, strict=True)):
        columns = n * (weight.size(1) if weight.dim() > 1 else 1)
        row_out = torch.full((weight.size(0), sums), float("nan")) if rows else None
        col_out = torch.full((columns, sums), float("nan")) if cols else None
        outputs.append((row_out, col_out))
        grad, hvp = (*others, None)[:2]
        items.append(parameter_item(weight, grad, hvp, n, row_out, col_out, i))
    table = (ParameterStruct * len(items))(*(_packed(item) for item in items))
    count = ctypes.c_int64(len(items))
    size = getattr(kernels(), f"{op}_workspace")(table, count)
    _workspace, pointer = poisoned(size)
    getattr(kernels(), op)(table, count, pointer, *(ctypes.c_uint64(s % 2**64) for s in seed))
    return outputs


def _packed(item: ParameterItem) -> ParameterStruct:
    hvp, *outputs = (
        0 if t is None else t.data_ptr() for t in (item.hvp, item.row_out, item.col_out)
    )
    sizes = (item.rows, item.channels, item.kernel, item.groups)
    return ParameterStruct(
        item.weight.data_ptr(),
        item.grad.data_ptr(),
        hvp,
        *sizes,
        *outputs,
        CODES[item.weight.dtype],
        item.channels_last,
        item.stream,
    )
