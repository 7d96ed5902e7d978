"""Every Triton kernel compiles ahead of time, spills nothing and loads 16 bytes at a time.

No GPU is needed. Types and architectures take turns, other ones in each run.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.gpu_compile import (
    ARCHITECTURES,
    TYPE_NAMES,
    compile_triton,
    turns,
    uses_local_memory,
)

#: Types of elements and architectures, in turns.
TURNS = turns(TYPE_NAMES)

MOMENTS_ARGUMENTS = {"table": "*i64", "count": "i32"} | dict.fromkeys(
    ("row_out", "col_out", "workspace"), "*fp32"
)

not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


def check_triton(
    kernel: object,
    arguments: dict[str, str],
    constants: dict[str, object],
    folder: Path,
    *,
    vectors: bool,
    architectures: tuple[int, ...] = ARCHITECTURES,
    warps: int = 4,
) -> None:
    for arch in architectures:
        compiled = compile_triton(kernel, arguments, constants, arch, warps=warps)
        wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.ptx))
        assert wide >= 2 or not vectors, f"sm_{arch}: {wide} loads of 128 bits"
        assert not uses_local_memory(compiled.cubin, arch, folder), f"sm_{arch}: local memory"


@pytest.fixture(scope="module")
def moments() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module("taylor_kernels.backends.triton.moments")


@pytest.fixture(scope="module")
def gates() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module("taylor_kernels.backends.triton.gate_gradients")


@pytest.mark.sample
@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
@pytest.mark.parametrize("grids", [False, True], ids=("rows", "grids"))
def test_triton_moments(
    moments: ModuleType, dtype: torch.dtype, arch: int, grids: bool, tmp_path: Path
) -> None:
    check_triton(
        moments.stream_kernel,
        {**MOMENTS_ARGUMENTS, "seed": "i64"},
        moments.constants(moments.PARAMETER_OPS["filter_moments"], dtype, grids, grids),
        tmp_path,
        vectors=True,
        architectures=(arch,),
    )


@pytest.mark.sample
@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
@pytest.mark.parametrize("name", ["second_order_moments", "hutchinson_moments"])
def test_triton_other_moments(
    moments: ModuleType, name: str, dtype: torch.dtype, arch: int, tmp_path: Path
) -> None:
    op = moments.PARAMETER_OPS[name]
    check_triton(
        moments.stream_kernel,
        {**MOMENTS_ARGUMENTS, "seed": "i64"},
        moments.constants(op, dtype, True, True),
        tmp_path,
        vectors=True,
        architectures=(arch,),
        warps=op.warps,
    )


@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
def test_triton_rademacher(dtype: torch.dtype, arch: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("taylor_kernels.backends.triton.rademacher")
    draws, each = module.TILE
    constants = {"DRAWS": draws, "EACH": each}
    arguments = {"table": "*i64", "count": "i32", "out": TYPE_NAMES[dtype], "seed": "i64"}
    check_triton(
        module.fill_kernel, arguments, constants, tmp_path, vectors=False, architectures=(arch,)
    )


#: Projection, levels, update: the rules with most registers, and that of the published method.
MIRROR_RULES = [(1, 2, 0), (1, 3, 1), (2, 3, 1), (2, 3, 2)]


@pytest.mark.sample
@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
@pytest.mark.parametrize("rule", MIRROR_RULES, ids=str)
def test_triton_mirror_step(
    rule: tuple[int, int, int], dtype: torch.dtype, arch: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("taylor_kernels.backends.triton.mirror_step")
    types = importlib.import_module("taylor_kernels.backends.triton.moments").TYPES
    projection, levels, update = rule
    constants = {
        "T": types[dtype],
        "PROJECTION": projection,
        "LEVELS": levels,
        "UPDATE": update,
        "DIRECTION": 2,
        "MOVES": True,
        "ROUNDED": False,
        "TILE": module.TILE,
    }
    arguments = {"table": "*i64", "numbers": "*fp32", "count": "i32"}
    check_triton(
        module.mirror_kernel, arguments, constants, tmp_path, vectors=True, architectures=(arch,)
    )


@pytest.mark.sample
@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
@pytest.mark.parametrize("name", ["digit", "pick", "ties", "locate", "momentum"])
def test_triton_ranking_and_step(
    moments: ModuleType, name: str, dtype: torch.dtype, arch: int, tmp_path: Path
) -> None:
    folder = "taylor_kernels.backends.triton"
    ranking = importlib.import_module(f"{folder}.global_threshold")
    step = importlib.import_module(f"{folder}.sparse_momentum")
    pointers = dict.fromkeys(("table", "bins", "state", "out", "ties", "threshold"), "*i64")
    arguments = pointers | dict.fromkeys(("count", "chunks", "first", "mine"), "i32")
    element = {"T": moments.TYPES[dtype], "TILE": ranking.TILE}
    chunked = {**element, "SIGNED": False, "CHUNK": ranking.CHUNK}
    digit = {"SHIFT": 10, "MASK": 2047, "ABOVE": 0xFFE00000}
    constants = {
        "digit": {**chunked, **digit},
        "pick": {"SHIFT": 10},
        "ties": chunked,
        "locate": {**chunked, "TIES": ranking.TIES},
        "momentum": {**element, "TILE": step.TILE},
    }[name]
    kernel = getattr(step if name == "momentum" else ranking, f"{name}_kernel")
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    check_triton(kernel, given, constants, tmp_path, vectors=False, architectures=(arch,))


@not_interpreted
def test_triton_moments_finish(moments: ModuleType, tmp_path: Path) -> None:
    constants = {**dict(zip("PE", moments.FINISH_TILE, strict=True)), "SUMS": 5}
    check_triton(moments.finish_kernel, MOMENTS_ARGUMENTS, constants, tmp_path, vectors=False)


@pytest.mark.sample
@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
@pytest.mark.parametrize("tile", range(4), ids=("rows", "rows 1", "rows 2", "columns"))
def test_triton_gates(
    gates: ModuleType, tile: int, dtype: torch.dtype, arch: int, tmp_path: Path
) -> None:
    name = TYPE_NAMES[dtype]
    tensors = {"y": name, "dy": name, "bias": name, "out": "*fp32"}
    integers = {"rows": "i32", "length": "i32:16", "tiles": "i32"}
    if tile < 3:
        kernel = gates.rows_kernel
        r, c, _ = gates.TILES[tile]
        integers["channels"] = "i32"
        constants = {"BIAS": True, "R": r, "C": c, "SEGMENT": gates.SEGMENT}
    else:
        kernel = gates.cols_kernel
        r, c = gates.MATRIX_TILE
        integers |= dict.fromkeys(("inner", "row_blocks"), "i32")
        constants = {"BIAS": True, "R": r, "C": c, "BLOCK_ROWS": gates.BLOCK_ROWS}
    arguments = {**tensors, **integers}
    check_triton(kernel, arguments, constants, tmp_path, vectors=True, architectures=(arch,))


@not_interpreted
def test_triton_gates_finish(gates: ModuleType, tmp_path: Path) -> None:
    counts = dict.fromkeys(("tiles", "batch", "parts", "channels", "run"), "i32")
    constants = dict(zip("PE", gates.FINISH_TILE, strict=True))
    arguments = {"partials": "*fp32", "out": "*fp32", **counts}
    check_triton(gates.finish_kernel, arguments, constants, tmp_path, vectors=False)
