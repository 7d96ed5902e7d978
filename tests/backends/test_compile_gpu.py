"""Every GPU kernel compiles, spills nothing and loads 16 bytes at a time.

No GPU is needed: nvcc and Triton compile ahead of time. Without them these tests are skipped. A
CUDA source is compiled for every architecture where it is not the one on record. Of those that have
not changed each run draws a half, and an architecture for each.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.gpu_compile import (
    ARCHITECTURES,
    LOCAL_MEMORY,
    ROOT,
    SOURCES,
    TYPE_NAMES,
    architectures_of,
    compile_cuda,
    compile_triton,
    cuobjdump,
    kept_cuda,
    sass_of_functions,
    turns,
    uses_local_memory,
)

#: fp32, fp16 and bf16 each read every tensor, two but for one op, by at least one vector load.
VECTOR_LOADS = {"second_order_moments.cu": 9}
MIN_VECTOR_LOADS = 6
#: Either side of conv2d_fisher's tiles, where its vectors are aligned.
TILE_VECTOR_LOADS = 2

#: Types of elements and architectures, in turns.
TURNS = turns(TYPE_NAMES)

MOMENTS_ARGUMENTS = {"table": "*i64", "count": "i32"} | dict.fromkeys(
    ("row_out", "col_out", "workspace"), "*fp32"
)

not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


#: Those that this run compiles.
COMPILED = [source for source in SOURCES if architectures_of(source)]
#: Ops that are not in the source of their name.
ELSEWHERE = {"conv2d_example_norms": "conv2d_fisher"}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", COMPILED, ids=lambda path: path.name)
def test_cuda(source: Path) -> None:
    binary, kernels = kept_cuda(source)
    architectures = architectures_of(source)
    assert {kernel.arch for kernel in kernels} == set(architectures)
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel
    tool = cuobjdump()
    if tool is None:
        pytest.skip("compiled without spills; no cuobjdump to look for vector loads with")
    for arch in architectures:
        for name, sass in sass_of_functions(binary, arch, tool).items():
            if "stream_kernel" in name:
                wide = len(re.findall(r"\bLDG\.E\.128", sass))
                least = VECTOR_LOADS.get(source.name, MIN_VECTOR_LOADS)
                assert wide >= least, f"{name} for sm_{arch}: {wide} loads of 128 bits"
            if "flat_kernel" in name:
                assert len(re.findall(r"\bLDG\.E\.128", sass)) >= MIN_VECTOR_LOADS, name
                assert re.search(r"\bSTG\.E\.128", sass), f"{name} for sm_{arch}"
            check_overlap(name, arch, sass)
            if "rademacher_kernel" in name:
                assert re.search(r"\bSTG\.E\.128", sass), f"{name} for sm_{arch}"
            if "mirror_kernel" in name:  # value, moments; the parameter and gradient of floats
                assert len(re.findall(r"\bLDG\.E\.128", sass)) >= MIN_VECTOR_LOADS // 2, name
                assert len(re.findall(r"\bSTG\.E\.128", sass)) >= MIN_VECTOR_LOADS // 2, name
            if "fisher_gemm_kernel" in name:
                wide = len(re.findall(r"\bLDG\.E\.128", sass))
                assert wide >= TILE_VECTOR_LOADS, f"{name} for sm_{arch}: {wide} loads of 128 bits"
                assert bool(re.search(r"\bHMMA\.", sass)) == ("3Mma" in name), f"{name}: sm_{arch}"
            if "fisher_pipelined_kernel" in name:
                check_pipeline(f"{name} for sm_{arch}", sass)
            assert not LOCAL_MEMORY.findall(sass), f"{name} for sm_{arch}: local memory"


def check_pipeline(name: str, sass: str) -> None:
    """Both sides are copied past the registers, 16 bytes at once or 4; other groups may be on their
    way when the kernel waits for the oldest."""
    copies = re.findall(r"\bLDGSTS\.E(?:\.\w+)*", sass)
    wide = [copy for copy in copies if copy.endswith(".128")]
    assert len(wide) >= TILE_VECTOR_LOADS, f"{name}: {len(wide)} copies of 128 bits"
    assert len(copies) > len(wide), f"{name}: no copies of 32 bits"
    assert re.search(r"\bHMMA\.", sass), name
    waits = [int(n, 16) for n in re.findall(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)", sass)]
    assert max(waits) >= 1, f"{name} waits for all copies at once: {waits}"


def check_overlap(name: str, arch: int, sass: str) -> None:
    """From sm_90 on the second stage, which is launched early, waits before it reads or writes what
    other kernels do too, and the first stage lets it come."""
    waits, lets = re.search(r"\bACQBULK\b", sass), re.search(r"\bPREEXIT\b", sass)
    if arch < 90:
        assert not waits, f"{name} for sm_{arch}"
        assert not lets, f"{name} for sm_{arch}"
    elif "finish_kernel" in name:
        touched = re.search(r"\b(?:LDG|STG)\b", sass)
        assert touched, f"{name} for sm_{arch}"
        assert waits, f"{name} for sm_{arch}"
        assert waits.start() < touched.start(), f"{name} for sm_{arch}: reads before it waits"
    elif "stream_kernel" in name or "fisher_" in name:
        assert lets, f"{name} for sm_{arch}"


#: What the Python module calls; its own code is compiled by tests/helpers/emulated.py, where all
#: sources are linked.
CALLS = """
#include <cstdio>
#include "common/ops.h"
#include "cuda/device_check.h"
int main() {{
  {says}
  std::printf("problem: %s\\n", std::string(tk::cuda_device_problem()).c_str());
}}
"""
SAYS = 'std::printf("{op} %d\\n", &tk::{op}_cuda != nullptr);'


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_what_is_compiled_links_and_finds_the_gpu_or_says_why_not(
    tmp_path: Path,
) -> None:
    every = re.findall(r"^  X\((\w+),", (ROOT / "csrc/common/ops.h").read_text(), re.MULTILINE)
    source_of = {op: ELSEWHERE.get(op, op) for op in every}
    check = next(source for source in SOURCES if source.stem == "device_check")
    assert {*source_of.values(), check.stem} == {source.stem for source in SOURCES}
    compiled = {source.stem for source in COMPILED}
    called = [op for op in every if source_of[op] in compiled]
    main = tmp_path / "main.cpp"
    main.write_text(CALLS.format(says="\n  ".join(SAYS.format(op=op) for op in called)))
    objects = [kept_cuda(source)[0] for source in COMPILED]
    if check not in COMPILED:
        objects.append(compile_cuda(check, tmp_path, ARCHITECTURES[:1])[0])
    program = tmp_path / "main"
    command = ["nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", main, *objects, "-o", program]
    linked = subprocess.run(command, capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr[-4000:]
    *ops, problem = subprocess.run(
        [program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert ops == [f"{op} 1" for op in called]
    assert (problem == "problem: ") == torch.cuda.is_available()


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


#: An op, and whether there are grids among its tensors.
MOMENTS = [
    ("filter_moments", False),
    ("filter_moments", True),
    ("second_order_moments", True),
    ("hutchinson_moments", True),
]


@pytest.mark.sample
@not_interpreted
@pytest.mark.parametrize(("dtype", "arch"), TURNS, ids=str)
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_triton_moments(
    moments: ModuleType, moment: tuple[str, bool], dtype: torch.dtype, arch: int, tmp_path: Path
) -> None:
    name, grids = moment
    op = moments.PARAMETER_OPS[name]
    check_triton(
        moments.stream_kernel,
        {**MOMENTS_ARGUMENTS, "seed": "i64"},
        moments.constants(op, dtype, grids, grids),
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
