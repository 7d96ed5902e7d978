"""The example that torchrun starts: resumed by another number of processes than began it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.programs import run_program

EXAMPLE = ROOT / "examples" / "prune_ddp.py"
#: Seconds that a run may take, the imports of its processes on a busy machine among them.
LIMIT = 150


def torchrun(folder):
    """What two processes printed; all its processes are killed if it takes too long."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, "--nproc-per-node", "2", str(EXAMPLE)]
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


def alone(folder):
    """What it printed as the only process, which is told so as torchrun would."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    program = f"import os\nos.chdir({str(folder)!r})\n{EXAMPLE.read_text()}"
    done = run_program(program, LIMIT, optimizers=True, **place, **meeting)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_and_is_resumed_by_one(tmp_path):
    first = torchrun(tmp_path)
    widths = dict(re.findall(r"rank (\d): (\{[^}]*\})", first))
    assert widths.keys() == {"0", "1"}
    assert widths["0"] == widths["1"]
    assert "step 4: " in first
    second = alone(tmp_path)
    assert re.findall(r"rank (\d): (\{[^}]*\})", second) == [("0", widths["0"])]
    assert "step 4: " not in second  # it began where the others had stopped
