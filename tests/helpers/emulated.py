"""The CUDA kernels on a CPU: csrc/cuda compiled against tests/backends/emulation, run in fibers.

What this proves is the logic: every element is read once, every output is written, and the bits
depend on nothing but the shape. Speed, races and real launches are for tests/gpu.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from taylor_kernels.backends.native import DTYPES
from taylor_kernels.layout import parameter_item
from tests.helpers import ROOT
from tests.helpers.cases import MomentsCase, filter_moments_cases
from tests.helpers.kept import included, kept

EMULATION = ROOT / "tests" / "backends" / "emulation"
INCLUDE = sysconfig.get_paths()["include"]

#: Of the kernels, whose sums must not be fused where a GPU's are not.
KERNEL_FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-x", "c++")
#: Of the Python module around them, of which most is pybind11: it need not be fast.
MODULE_FLAGS = ("-std=c++20", "-O0")

#: Shapes that cross a limit of csrc/cuda/task_plan.h: segments of rows, blocks of rows, tiles of
#: positions. Not the empty ones, for which the op answers itself.
MOMENTS_CASES = [
    *(case for case in filter_moments_cases() if 0 not in case.shape),
    MomentsCase("rows_of_one_vector", (530, 8)),
    MomentsCase("rows_of_few_vectors", (300, 64)),
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


@cache
def kernels() -> ModuleType:
    """The module of tests/backends/emulation/entry.cpp."""
    pybind11 = pytest.importorskip("pybind11", reason="no pybind11 to build the emulation with")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    include = [f"-I{header}" for header in (pybind11.get_include(), INCLUDE)]
    version = subprocess.check_output([compiler, "--version"], text=True)
    words = (version, *KERNEL_FLAGS, *MODULE_FLAGS, *include, sys.version, pybind11.__version__)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            _compile(Path(name), compiler, include, folder / "emulated.so")

    files = included(*(ROOT / "csrc").rglob("*.cu"), *EMULATION.iterdir())
    folder = kept("emulation", files, words, build)
    spec = spec_from_file_location("emulated", folder / "emulated.so")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_dtypes(**DTYPES)
    return module


def _compile(folder: Path, compiler: str, include: list[str], target: Path) -> None:
    # A copy of csrc/, so that a header of the emulation stands for the one of its name there.
    shutil.copytree(ROOT / "csrc", folder, dirs_exist_ok=True)
    for path in EMULATION.iterdir():
        shutil.copy(path, folder / "cuda" if path.name == "ptx.cuh" else folder)

    def compiled(source: str) -> str:
        target = f"{Path(source).stem}.o"
        flags = KERNEL_FLAGS if source.endswith(".cu") else MODULE_FLAGS
        command = [compiler, *flags, "-fPIC", "-I.", *include, "-c", source, "-o", target]
        subprocess.run(command, check=True, cwd=folder)
        return target

    sources = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.cu"))]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, [*sources, "entry.cpp"]))
    subprocess.run([compiler, "-shared", *objects, "-o", target], check=True, cwd=folder)


def poisoned(size: int) -> Tensor:
    """A workspace of so many bytes full of NaN: reading a sum that nothing wrote would show."""
    return torch.full((size // 4,), float("nan"))


def run(op: str, call: object, *seed: int) -> None:
    """The CUDA kernels of an op for what layout.py describes."""
    taken = []  # what was launched last runs after the op has given its workspace back

    def allocate(size: int) -> Tensor:
        taken.append(poisoned(size))
        return taken[-1]

    getattr(kernels(), f"{op}_cuda")(call, 0, allocate, *(s % 2**64 for s in seed))
    kernels().synchronize()
    assert len(taken) <= 1, "a call takes its workspace at once"


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
        grad, hvp = (None, *others) if op == "hutchinson_moments" else (*others, None)[:2]
        items.append(parameter_item(weight, grad, hvp, n, row_out, col_out, i))
    run(op, items, *seed)
    return outputs
