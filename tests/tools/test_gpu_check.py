"""What gpu-check does around its steps: their time, their ends. Needs no GPU."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import taylor_kernels as tk
from tests.helpers import ROOT
from tools.gpu_check import TOTAL, Step, finish, run, steps


def test_a_stopped_step_leaves_nothing_running(tmp_path):
    """What a command has started would go on to take the next step's time, and the GPU."""
    late = tmp_path / "late"
    script = f"echo begun; (sleep 1; touch {late}) & wait"
    code, output = finish(["bash", "-c", script], dict(os.environ), 0.3, [])
    assert code == 124
    assert output.startswith("begun")
    time.sleep(1.2)
    assert not late.exists()


def test_an_interrupted_step_leaves_nothing_running(tmp_path):
    late, log = tmp_path / "late", tmp_path / "log"
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Step("some", [["bash", "-c", f"sleep 1; touch {late}"]], 9.0), log, 9.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    time.sleep(1.2)
    assert not late.exists()


def test_exit_codes(tmp_path):
    log = tmp_path / "log"
    for script, code in (("exit 0", 0), ("exit 5", 5), ("kill -9 $$", 137)):
        result = run(Step("some", [["true"], ["bash", "-c", script]], 9.0), log, 9.0)
        assert (result["ok"], result["code"]) == (code == 0, code)
    assert run(Step("none", [["/no/such/command"]], 9.0), log, 9.0)["code"] == 127


@pytest.mark.parametrize("asked", ["on", "auto"])
def test_tests_of_a_backend_that_was_not_built_fail_where_it_is_asked_for(tmp_path, asked):
    """Skipped, they would let gpu-check pass."""
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text("def test(backend): pass")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda"]
    environment = {**os.environ, "TAYLOR_KERNELS_CUDA": asked}
    code, output = finish([*command, str(tmp_path)], environment, 60.0, [])
    fails = asked == "on" and not tk.available_backends()["cuda"]
    assert code == fails
    assert ("backend 'cuda' is asked for, but not available" in output) == fails


def test_benches_are_told_the_time_that_is_left(tmp_path):
    """Not that which they had if all before them had been quick: stopped, they leave no results."""
    step = Step("bench", [["echo"]], 90.0, 30.0)
    for left, told in ((200.0, "--seconds=60"), (50.0, "--seconds=20")):
        assert run(step, tmp_path / "log", left)["last_line"] == told
    for some in (step, Step("build", [["true"]], 90.0)):
        assert not run(some, tmp_path / "log", some.spare)["ok"]


def test_named_steps_share_the_time_of_all():
    (only,) = steps(["tests", "tests"], Path())
    assert (only.name, only.seconds) == ("tests", TOTAL)
    assert [step.name for step in steps(["tune", "build"], Path())] == ["build", "tune"]
    with pytest.raises(SystemExit, match="'biuld' is no step; there are build, tests"):
        steps(["biuld"], Path())
