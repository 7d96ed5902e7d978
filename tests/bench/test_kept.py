"""A run of benches that is stopped keeps what it measured, and goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.programs import Run, run_pytest

CONFTEST = """
from bench.kept import Kept
def pytest_addoption(parser):
    parser.addoption("--results")
    parser.addoption("--resume", action="store_true")
def pytest_configure(config):
    config.pluginmanager.register(Kept(config))
"""
BENCHES = """
import os, pathlib, pytest
def test_one(benchmark): benchmark(lambda: None)
def test_skipped(benchmark): pytest.skip("not here")
def test_stopped(benchmark):
    if not pathlib.Path("again").exists(): os._exit(9)
    benchmark(lambda: None)
def test_last(benchmark): benchmark(lambda: None)
"""


#: No rounds but a few: what a bench measures is of no matter.
FEW = ("--benchmark-max-time=0.01", "--benchmark-min-time=1e-6", "--benchmark-min-rounds=2")


def run(folder: Path, *arguments: str) -> Run:
    inside = f"import os\nos.chdir({str(folder)!r})"
    return run_pytest("--results=new/part.json", *FEW, *arguments, ".", before=inside)


def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_benches.py").write_text(BENCHES)
    stopped = run(tmp_path)
    assert stopped.returncode == 9, stopped.stdout + stopped.stderr
    assert "4 benches, no earlier run tells how long" in stopped.stdout
    kept = json.loads((tmp_path / "new" / "part.json").read_text())
    assert [bench["name"] for bench in kept["benchmarks"]] == ["test_one"]
    assert len(kept["finished"]) == 2, "the one that could not run is done too"

    (tmp_path / "again").touch()
    resumed = run(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stdout
    assert "2 benches, about " in resumed.stdout
    whole = json.loads((tmp_path / "new" / "part.json").read_text())
    assert [bench["name"] for bench in whole["benchmarks"]] == [
        "test_one",
        "test_stopped",
        "test_last",
    ]
    assert whole["benchmarks"][0] == kept["benchmarks"][0]
    assert len(whole["finished"]) == 4
