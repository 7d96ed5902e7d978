"""The CUDA kernels on a CPU: csrc/*.cu compiled against tests/emulation and run fiber by fiber.

What this proves is the logic: every element is read once, every output is written, and the bits
depend on nothing but the shape. Speed, races and real launches are for tests/gpu.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
OPS = ("filter_moments", "gate_gradients", "conv2d_fisher")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas")
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def kernels() -> ctypes.CDLL:
    """The launchers of tests/emulation/entry.cpp; compiled once for all tests of a run."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    with tempfile.TemporaryDirectory() as name:
        # One folder, so that a header of the emulation stands for the one of its name in csrc/.
        folder = Path(name)
        for source in (ROOT / "csrc", ROOT / "tests" / "emulation"):
            for path in source.iterdir():
                shutil.copy(path, folder)

        def compiled(source: str) -> str:
            target = f"{source}.o"
            command = [compiler, *FLAGS, "-I.", "-x", "c++", "-c", source, "-o", target]
            subprocess.run(command, check=True, cwd=folder)
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, [*(f"{op}.cu" for op in OPS), "entry.cpp"]))
        subprocess.run([compiler, "-shared", *objects, "-o", "emulated.so"], check=True, cwd=folder)
        loaded = ctypes.CDLL(str(folder / "emulated.so"))
    for workspace in (loaded.moments_workspace, loaded.gates_workspace, loaded.fisher_workspace):
        workspace.restype = ctypes.c_int64
    return loaded


def poisoned(size: int) -> tuple[Tensor, ctypes.c_void_p]:
    """A workspace of so many bytes full of NaN: reading a sum that nothing wrote would show."""
    workspace = torch.full((size // 4,), float("nan"))
    return workspace, ctypes.c_void_p(workspace.data_ptr())
