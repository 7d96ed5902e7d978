"""The example that torchrun starts: resumed by another number of processes than began it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

#: Seconds that a run may take, the imports of its processes on a busy machine among them.
LIMIT = 150


def torchrun(size, folder):
    """What it printed; all its processes are killed if it takes too long."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, "--nproc-per-node", str(size), str(ROOT / "examples" / "prune_ddp.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"torchrun took over {LIMIT} s: {process.communicate()[0]}")
    assert process.returncode == 0, said
    return said


def test_the_example_runs_and_is_resumed_by_one(tmp_path):
    first = torchrun(2, tmp_path)
    widths = dict(re.findall(r"rank (\d): (\{[^}]*\})", first))
    assert widths.keys() == {"0", "1"}
    assert widths["0"] == widths["1"]
    assert "step 4: " in first
    second = torchrun(1, tmp_path)
    assert re.findall(r"rank (\d): (\{[^}]*\})", second) == [("0", widths["0"])]
    assert "step 4: " not in second  # it began where the others had stopped
