"""A results file as cases and providers, and what a target is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPS = (
    "filter_moments",
    "second_order_moments",
    "hutchinson_moments",
    "rademacher_like",
    "gate_gradients",
)


@dataclass
class Entry:
    """One provider in one case, as pytest-benchmark stored it; times in seconds."""

    stats: dict[str, float]
    info: dict[str, Any]

    @property
    def label(self) -> str:
        return self.info["provider"]

    @property
    def median(self) -> float:
        return self.stats["median"]


@dataclass
class Case:
    """The providers of one case."""

    name: tuple[str, ...]
    entries: list[Entry]

    def get(self, label: str) -> Entry | None:
        return next((e for e in self.entries if e.label == label), None)

    def fastest(self, **wanted: str) -> Entry | None:
        """The fastest provider whose info has these values: role=..., family=..."""
        found = [e for e in self.entries if all(e.info[k] == v for k, v in wanted.items())]
        return min(found, key=lambda e: e.median, default=None)

    @property
    def run(self) -> str:
        """Commit, day and processor of its figures."""
        return self.entries[0].info["run"]

    @property
    def ours(self) -> Entry | None:
        return self.fastest(role="ours")


@dataclass
class Results:
    """A results file."""

    path: Path
    machine: dict[str, Any]
    runs: list[str]  # commits, days and processors that the figures are of
    cases: list[Case]

    def number_of(self, case: Case) -> int:
        """Which of the runs a case is of, from 1."""
        return self.runs.index(case.run) + 1

    def of(self, bench: str) -> list[Case]:
        return [case for case in self.cases if case.name[0] == bench]


def run_of(raw: dict[str, Any]) -> str:
    """The commit (+: with changes on top), the day and the processor of pytest-benchmark's file."""
    commit, machine = raw["commit_info"], raw["machine_info"]
    changed = "+" if commit.get("dirty") else ""
    processor = machine.get("gpu") or machine.get("cpu", {}).get("brand_raw") or "unknown processor"
    day = raw["datetime"][:10]
    return f"commit {(commit.get('id') or 'unknown')[:10]}{changed}, {day}, {processor}"


def load(path: Path) -> Results:
    raw = json.loads(path.read_text())
    cases: dict[tuple[str, ...], list[Entry]] = {}
    for bench in raw["benchmarks"]:
        bench["extra_info"].setdefault("run", run_of(raw))
        entry = Entry(bench["stats"], bench["extra_info"])
        cases.setdefault(tuple(entry.info["case"]), []).append(entry)
    runs = dict.fromkeys(b["extra_info"]["run"] for b in raw["benchmarks"])
    return Results(
        path,
        raw["machine_info"],
        list(runs),
        [Case(name, entries) for name, entries in cases.items()],
    )


@dataclass
class PerformanceTarget:
    """A ratio to reach, and what was measured; `least`: it must be at least that, else at most."""

    what: str
    limit: float
    measured: float
    least: bool = False
    unit: str = "×"

    @property
    def reached(self) -> bool:
        return self.measured >= self.limit if self.least else self.measured <= self.limit

    def row(self) -> list[str]:
        sign = "≥" if self.least else "≤"
        return [
            self.what,
            f"{sign} {self.limit:g}{self.unit}",
            f"{self.measured:.2f}{self.unit}",
            "ok" if self.reached else "not reached",
        ]
