"""One read finds the last of many scores, of magnitudes as of scores with a sign.

Where the window misses it, all scores are read three times, and the answer is the same: no result
of an op tells a window that never holds it from one that does.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from taylor_kernels.backends.native import _native
from tests.helpers import machine_code

pytestmark = pytest.mark.slow  # compiles a program


@pytest.mark.parametrize("isa", _native.cpu_isas() if _native else [])
def test_windows_hold_the_last_score(isa):
    machine_code.configure()
    main = Path(__file__).parent / "find_windows.cpp"
    program = machine_code.program({}, isa, main, machine_code.flags(isa))
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = [line.rsplit(": ", 1) for line in lines.splitlines()]
    assert len(found) == 15
    assert [case for case in found if case[1] != "found"] == []
