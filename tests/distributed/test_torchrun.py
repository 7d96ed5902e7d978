"""The example that torchrun starts: resumed by another number of processes than began it.

Here its processes are forked and told what torchrun would tell them;
tests/studies/own/test_processes.py starts torchrun itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy

import torch.distributed as dist

from tests.distributed.launch import ran
from tests.helpers import ROOT
from tests.helpers.programs import run_program

EXAMPLE = ROOT / "examples" / "prune_ddp.py"


def in_process(rank, size, folder, port):
    """What it printed."""
    dist.destroy_process_group()
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return said.getvalue()


def alone(folder):
    """What it printed as the only process, which is told so as torchrun would."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    program = f"import os\nos.chdir({str(folder)!r})\n{EXAMPLE.read_text()}"
    done = run_program(program, optimizers=True, **place, **meeting)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_and_is_resumed_by_one(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    both = ran(2, in_process, tmp_path, store.port)
    first = "".join(both)
    widths = dict(re.findall(r"rank (\d): (\{[^}]*\})", first))
    assert widths.keys() == {"0", "1"}
    assert widths["0"] == widths["1"]
    assert "step 4: " in both[0]
    second = alone(tmp_path)
    assert re.findall(r"rank (\d): (\{[^}]*\})", second) == [("0", widths["0"])]
    assert "step 4: " not in second  # it began where the others had stopped
