"""Every CUDA kernel compiles, spills nothing, loads 16 bytes at a time and keeps its loops short.

No GPU is needed: nvcc compiles ahead of time, and without it these tests are skipped. A source is
compiled for every architecture where it is not the one on record. Of those that have not changed
each run draws a half, and an architecture for each.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench.issue_slots import GPUS, SOURCE, blocks_of, cheapest_round, loops_of
from bench.kernel_resources import demangled
from tests.helpers.gpu_compile import (
    ARCHITECTURES,
    LOCAL_MEMORY,
    ROOT,
    SOURCES,
    architectures_of,
    compile_cuda,
    cuobjdump,
    kept_cuda,
    sass_of_functions,
)

#: fp32, fp16 and bf16 each read every tensor, two but for one op, by at least one vector load.
VECTOR_LOADS = {"second_order_moments.cu": 9}
MIN_VECTOR_LOADS = 6
#: Either side of conv2d_fisher's tiles, where its vectors are aligned.
TILE_VECTOR_LOADS = 2
#: Op -> loads of 16 bytes and operations on floats of a round of its loop in float32, and the most
#: that a thread may issue for it. Eight loads are of 16 elements of two tensors, twelve of three;
#: of hutchinson_moments, which draws signs, a round has eight elements.
ROUNDS = {
    "filter_moments": (8, 96, 200),
    "gate_gradients": (8, 16, 105),
    "hutchinson_moments": (4, 24, 205),
    "second_order_moments": (12, 64, 175),
}
SLOTS = ROOT / "bench" / "results" / "static" / "issue_slots.json"
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
            if source.stem in ROUNDS and "stream_kernel" in name:
                check_round(f"{name} for sm_{arch}", sass, *ROUNDS[source.stem])
            assert not LOCAL_MEMORY.findall(sass), f"{name} for sm_{arch}: local memory"
        if source == SOURCE and arch in GPUS:
            check_products(arch, sass_of_functions(binary, arch, tool))


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


def check_round(name: str, sass: str, loads: int, arithmetic: int, most: int) -> None:
    """A loop along memory stays as short as it is, whatever an edit or a compiler does."""
    slots = cheapest_round(blocks_of(sass), {"vectors": loads, "arithmetic": arithmetic})
    assert slots is not None, f"{name}: no such loop"
    assert slots <= most, f"{name}: {slots} instructions a round"


def check_products(arch: int, functions: dict[str, str]) -> None:
    """Products on tensor cores take no more instructions of a warp than is on record."""
    record = {
        (loop["kernel"], loop["arch"], loop["loads"]): loop["slots_per_product"]
        for loop in json.loads(SLOTS.read_text())
    }
    names = demangled(list(functions))
    loops = [loop for name, sass in functions.items() for loop in loops_of(names[name], arch, sass)]
    assert {loop[:3] for loop in loops} == {key for key in record if key[1] == arch}
    for loop in loops:
        assert loop.slots_per_product <= 1.05 * record[loop[:3]], loop


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
