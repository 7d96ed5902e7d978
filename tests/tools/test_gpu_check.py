"""What gpu-check does around its steps: their time, their ends. Needs no GPU."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import taylor_kernels as tk
from tests.conftest import pytest_collection_modifyitems
from tests.helpers import ROOT
from tests.helpers.programs import run_module, run_program, run_pytest
from tools import gpu_check
from tools.gpu_check import BENCHES, ON_DEMAND, SANITIZERS, TOTAL, gather, measured, steps
from tools.gpu_steps import Step, run, run_together
from tools.gpu_summary import LENGTH, summary

pytestmark = pytest.mark.long

#: What the machine that these steps are for may lack.
OPTIONAL = (
    "torch_pruning", "rich", "typer", "hypothesis", "pytest_benchmark", "xdist", "sklearn", "scipy",
    "matplotlib", "safetensors", "transformers", "monai", "opacus", "backpack",
)  # fmt: skip


def finish(command, environment, seconds, log):
    """One command alone."""
    return run_together([command], environment, seconds, log)[0]


class Held:
    """A pipe that a program holds open for long, whatever it is asked to do."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.program = f"(trap '' INT; echo begun; exec sleep 600) 3> {path} & wait"

    def wait_until_nobody_holds_it(self) -> None:
        for _ in range(6000):
            with suppress(BlockingIOError):
                assert os.read(self._read, 1) == b""
                return
            time.sleep(0.01)
        pytest.fail("it runs on")


def test_a_stopped_step_leaves_nothing_running(tmp_path):
    """What a command has started would go on to take the next step's time, and the GPU."""
    held = Held(tmp_path / "held")
    for seconds in (0.5, 5.0, 50.0):  # a busy machine starts slowly
        code, output = finish(["bash", "-c", held.program], dict(os.environ), seconds,
                              tmp_path / "log")  # fmt: skip
        held.wait_until_nobody_holds_it()
        if output:
            break
    assert code == 124
    assert output.startswith("begun")


def test_an_interrupted_step_leaves_nothing_running(tmp_path):
    held, log = Held(tmp_path / "held"), tmp_path / "log"

    def interrupt() -> None:
        while not (log.exists() and "begun" in log.read_text().splitlines()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run(Step("some", [["bash", "-c", held.program]], 60.0), log, 60.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    held.wait_until_nobody_holds_it()


@pytest.fixture
def in_the_background():
    """As a shell begins what is followed by `&`: deaf to interrupts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
def test_a_step_cut_short_keeps_what_it_had(tmp_path, monkeypatch):
    """Of tests the failures so far, of benches the results so far, and every line in the log."""
    for name in [name for name in os.environ if "XDIST" in name]:
        monkeypatch.delenv(name)  # with which pytest-benchmark would measure nothing
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes seconds
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = *.py")
    begun = tmp_path / "begun"
    (tmp_path / "some.py").write_text(
        "import pathlib, time\n"
        "def test_right(benchmark): benchmark(lambda: None)\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_long():\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        "    time.sleep(120)\n"
    )
    results, log = tmp_path / "results.json", tmp_path / "log"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "pytest_benchmark.plugin"]
    command += [f"--benchmark-json={results}", "--benchmark-max-time=0.01", str(tmp_path)]
    for seconds in (10.0, 30.0, 90.0):  # a busy machine starts slowly
        result = run(Step("some", [command], 90.0), log, seconds)
        if begun.exists() and result["failed"]:  # it was not cut as the pause began
            break
    assert result["code"] == 124
    assert len(result["failed"]) == 1
    assert "test_wrong" in result["failed"][0]
    assert "test_right PASSED" in log.read_text()
    assert len(json.loads(results.read_text())["benchmarks"]) == 1


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
    done = run_pytest("-q", "-k", "cuda", str(tmp_path), TAYLOR_KERNELS_CUDA=asked)
    fails = asked == "on" and not tk.available_backends()["cuda"]
    assert done.returncode == fails, done.stderr
    assert ("backend 'cuda' is asked for, but not available" in done.stdout) == fails


#: Puts packages that may be missing out of reach.
BARE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
class Find:
    def __call__(self, name, *args):
        missing = name.partition(".")[0] in {OPTIONAL!r}
        return None if missing else find(name, *args)
PathFinder.find_spec = Find()
"""


def test_tests_on_a_gpu_need_none_of_what_may_be_missing(tmp_path):
    """The steps' own commands collect all that the files hold."""
    for step in steps(["tests", "pruning"], tmp_path):
        python, m, module, *words = step.commands[0]
        assert (python, m) == (sys.executable, "-m")
        words = [word for word in words if not word.startswith("--share")]
        asked = (*words, "--collect-only", "-q")
        done = run_module(module, *asked, before=BARE, **step.environment)
        # Without a GPU no test is left, which is an end of its own.
        assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done
        # With a GPU, and without one.
        counted = re.search(r"(\d+) (?:tests collected|deselected)", done.stdout)
        assert counted, done.stdout
        assert int(counted[1]) > 10


def test_the_pruner_needs_none_of_what_may_be_missing():
    program = (
        "import importlib.util\n"
        "from taylor_kernels.pruning import Pruner\n"
        "from tests.helpers import zoo\n"
        "model, inputs = zoo.build('mobilenet')\n"
        "pruner = Pruner(model, inputs, params=0.5, every=1)\n"
        "while not pruner.done:\n"
        "    zoo.loss(model, inputs).backward()\n"
        "    pruner.step()\n"
        "    model.zero_grad()\n"
        "pruner.compact()\n"
        "print([importlib.util.find_spec(name) for name in ('rich', 'torch_pruning')])\n"
    )
    done = run_program(BARE + program)
    assert (done.returncode, done.stdout) == (0, "[None, None]\n"), done.stderr


@pytest.mark.parametrize("count", [1, 3, 40])
def test_shares_are_all_tests_once(count):
    """Those that fill the GPU are in one of them, after the others."""

    def items():
        large = SimpleNamespace(get_closest_marker=lambda name: name == "large", path="one file")
        some = SimpleNamespace(get_closest_marker=lambda name: False, path="one file")
        return [copy.copy(large if i % 5 == 3 else some) for i in range(23)]

    every = items()
    shares = []
    for i in range(count):
        config = SimpleNamespace(
            args=[],
            getoption=lambda name, i=i: f"{i + 1}/{count}",
            stash={},
            hook=SimpleNamespace(pytest_deselected=lambda items: None),
        )
        shares.append(list(every))
        pytest_collection_modifyitems(config, shares[-1])
    assert sorted(id(item) for share in shares for item in share) == sorted(map(id, every))
    large = [item for item in every if item.get_closest_marker("large")]
    assert count == 1 or shares[0][-len(large) :] == large
    sizes = [len(share) for share in shares[1:]]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_benches_are_told_the_time_that_is_left(tmp_path):
    """Not that which they had if all before them had been quick: stopped, they leave no results."""
    step = Step("bench", [["echo"]], 90.0, 30.0)
    for left, told in ((90.0, "--seconds=60"), (50.0, "--seconds=20")):
        assert run(step, tmp_path / "log", left)["last_lines"] == [told]
    for some in (step, Step("build", [["true"]], 90.0)):
        assert not run(some, tmp_path / "log", some.spare)["ok"]


def test_named_steps_share_the_time_of_all():
    (only,) = steps(["tests", "tests"], Path())
    assert (only.name, only.seconds) == ("tests", TOTAL)
    assert [step.name for step in steps(["tune", "build"], Path())] == ["build", "tune"]
    with pytest.raises(SystemExit, match="'biuld' is no step; there are build, tests"):
        steps(["biuld"], Path())


def test_all_steps_fit_the_time(monkeypatch):
    chosen = steps([], Path())
    assert sum(step.seconds for step in chosen) <= TOTAL + 1e-6
    names = [step.name for step in chosen]
    assert names == ["build", "tests", "pruning", "memcheck", "racecheck", *BENCHES]
    assert set(SANITIZERS) - set(names) == set(ON_DEMAND) - {"tune"}
    monkeypatch.setattr(gpu_check, "TOTAL", 0)
    assert sum(step.seconds for step in steps([], Path())) <= TOTAL, "they do not fit unstretched"


def test_the_summary_is_short_and_ends_in_the_verdicts(tmp_path):
    names = [f"test_{i}[{'x' * 200}]" for i in range(500)]
    case = {
        "stats": {"median": 1.25e-4},
        "extra_info": {
            "case": ["filter_moments", "resnet50-fp32", "rows"],
            "provider": "ours",
            "ratio_to_floor": 1.5,
            "percent_of_copy": 61.2,
            "host_s": 3e-5,
        },
    }
    measured(tmp_path, "bench").write_text(json.dumps({"benchmarks": [case] * 500}))
    failed = {"step": "tests", "ok": False, "code": 1, "seconds": 80.0, "last_lines": ["9 failed"]}
    ended = {"step": "memcheck", "ok": False, "code": 9, "seconds": 30.0, "last_lines": ["bad"]}
    report = {
        "machine": {"gpu": "a GPU", "torch": "2", "cuda": "13"},
        "missing": ["no torch_pruning: without Torch-Pruning as a peer"],
        "steps": [
            failed | {"failed": names},
            ended | {"failed": [], "ends": [["read of 4 bytes"]]},
        ],
        "bench": gather(tmp_path),
    }
    text = summary(report)
    assert len(text) <= LENGTH + 2
    lines = text.splitlines()
    assert lines[-2].split()[:4] == ["tests", "FAIL", "(1)", "80.0"]
    assert lines[-1].endswith("bad")
    for part in ("no torch_pruning", "test_0[", "read of 4 bytes", "125.0 µs  30 µs  61%  1.50×"):
        assert part in text
    assert len(summary(report | {"bench": None, "steps": []})) < 200
