"""Results that outlive a run that is stopped: the file is written anew after every bench."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest


class Kept:
    """A plugin of pytest that writes `--results`, goes on from it, and says how long still.

    Beside what pytest-benchmark writes, the file has the seconds that each bench took, those that
    could not run here included, under "finished": what `--resume` leaves out, and what the next
    run tells its own length from.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._path = Path(config.getoption("--results"))
        self._before: dict[str, Any] = {}
        self._finished: dict[str, float] = {}
        if config.getoption("--resume") and self._path.exists():
            self._before = json.loads(self._path.read_text())
            self._finished = dict(self._before.get("finished", {}))
        self._known = dict(self._finished)
        latest = self._path.with_name("latest.json")
        if latest.exists():
            self._known |= json.loads(latest.read_text()).get("finished", {})
        self._left: list[str] = []
        self._started = 0.0
        self._failed = ""
        self._machine: tuple[dict[str, Any], dict[str, Any]] | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._finished]
        if done:
            items[:] = [item for item in items if item.nodeid not in self._finished]
            self._config.hook.pytest_deselected(items=done)
        self._left = [item.nodeid for item in items]

    def pytest_collection_finish(self) -> None:
        length = f"about {self._minutes()}" if self._known else "no earlier run tells how long"
        self._say(f"{len(self._left)} benches, {length}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._started = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed = report.nodeid
        if report.when != "teardown" or report.nodeid == self._failed:
            return
        seconds = time.monotonic() - self._started
        if report.nodeid in self._left:
            self._left.remove(report.nodeid)
        self._finished[report.nodeid] = self._known[report.nodeid] = seconds
        self._write()
        if seconds > 1 and self._left:  # the first of its case, in which all of it is measured
            self._say(f"{len(self._left)} benches left, about {self._minutes()}")

    def _minutes(self) -> str:
        """How long those that are left will take: as the last time, or the mean of the others."""
        mean = sum(self._known.values()) / max(1, len(self._known))
        minutes = sum(self._known.get(nodeid, mean) for nodeid in self._left) / 60
        return f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{60 * minutes:.0f} seconds"

    def _say(self, text: str) -> None:
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(text)

    def _write(self) -> None:
        """In the form of pytest-benchmark's own file, which a run that is stopped leaves empty."""
        hook, session = self._config.hook, self._config._benchmarksession
        if self._machine is None:
            commit = hook.pytest_benchmark_generate_commit_info(config=self._config)
            hook.pytest_benchmark_update_commit_info(config=self._config, commit_info=commit)
            self._machine = session.get_machine_info(), commit
        machine, commit = self._machine
        found = hook.pytest_benchmark_generate_json(
            config=self._config,
            benchmarks=[bench for bench in session.benchmarks if not bench.has_error],
            include_data=True,
            machine_info=machine,
            commit_info=commit,
        )
        hook.pytest_benchmark_update_json(
            config=self._config, benchmarks=session.benchmarks, output_json=found
        )
        found["benchmarks"] = self._before.get("benchmarks", []) + found["benchmarks"]
        found["finished"] = self._finished
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(found, indent=4, default=str))
        new.replace(self._path)
