"""The Triton kernels in Triton's interpreter, on CPU tensors.

The interpreter is chosen by an environment variable when kernels are imported, and the rest of the
suite compiles them; so the tests in the folder `interpreted` run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_interpreted_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = Path(__file__).with_name("interpreted")
    scripts = [str(folder / f"{name}.py") for name in ("lists_and_gates", "fisher")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *scripts],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
