"""exp and tanh of the CPU kernels: within the bounds that csrc/cpu/elementary.h states."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from taylor_kernels.backends.native import _native
from tests.helpers import ROOT

#: Units in the last place, over all floats (measured with a step of 1 in place of 9001);
#: csrc/cpu/elementary.h names the same.
BOUNDS = {"exp": 1.01, "tanh": 1.34}
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl"],
}
SETS = [isa for isa in _native.cpu_isas() if isa in FLAGS] if _native else []


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the functions with")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags are of x86-64")
@pytest.mark.parametrize("isa", SETS)
def test_errors_are_within_the_stated_bounds(isa: str, tmp_path: Path) -> None:
    program = tmp_path / "measure"
    source = ROOT / "tests/methods/measure_elementary.cpp"
    command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", "-Wno-psabi", f"-DTK_ISA={isa}"]
    subprocess.run(
        [*command, *FLAGS[isa], f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True
    )
    # Every 9001st float of either sign, other ones in each run.
    done = subprocess.run(
        [program, str(random.randrange(9001)), "9001"], capture_output=True, text=True, check=True
    )
    found = dict(line.split() for line in done.stdout.splitlines())
    for name, bound in BOUNDS.items():
        assert float(found[name]) <= bound, found
    assert found["special"] == "0"
