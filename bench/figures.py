"""A results file as cases and providers, and the targets they are held against."""

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
    def ours(self) -> Entry | None:
        return self.fastest(role="ours")


@dataclass
class Results:
    """A results file."""

    path: Path
    machine: dict[str, Any]
    runs: list[str]  # commits and days that the figures are of
    cases: list[Case]

    def of(self, bench: str) -> list[Case]:
        return [case for case in self.cases if case.name[0] == bench]


def run_of(raw: dict[str, Any]) -> str:
    """The commit (+: with changes on top) and the day of pytest-benchmark's file."""
    commit = raw["commit_info"]
    changed = "+" if commit.get("dirty") else ""
    return f"commit {(commit.get('id') or 'unknown')[:10]}{changed}, {raw['datetime'][:10]}"


def load(path: Path) -> Results:
    raw = json.loads(path.read_text())
    cases: dict[tuple[str, ...], list[Entry]] = {}
    for bench in raw["benchmarks"]:
        entry = Entry(bench["stats"], bench["extra_info"])
        cases.setdefault(tuple(entry.info["case"]), []).append(entry)
    runs = dict.fromkeys(b["extra_info"].get("run", run_of(raw)) for b in raw["benchmarks"])
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


def targets(results: Results) -> list[PerformanceTarget]:
    """Those of moments, gates and gate scores; fisher_report.py has the others."""
    found: list[PerformanceTarget] = []
    for case in results.of("filter_moments"):
        ours, axis = case.ours, case.name[2]
        if ours is None or axis == "cols":
            continue
        where = " ".join(case.name)
        rows = axis == "rows"
        floor, eager = case.fastest(role="floor"), case.fastest(family="eager")
        if floor:
            limit = 1.15 if rows else 1.6
            found.append(
                PerformanceTarget(
                    f"{where}: time over read floor", limit, ours.median / floor.median
                )
            )
        if eager and rows:
            found.append(
                PerformanceTarget(
                    f"{where}: faster than eager", 4.0, eager.median / ours.median, True
                )
            )
        for label in ("torch.compile", "torch.compile, one graph"):
            compiled = case.get(label)
            if compiled is None:
                continue
            what = f"{where}: faster than {label}"
            limit = 1.0 if rows else 1.3
            found.append(PerformanceTarget(what, limit, compiled.median / ours.median, True))
    for op in OPS:
        peaks = [
            (case.ours.info["peak_mib"], case)
            for case in results.of(op)
            if case.ours and case.ours.info["peak_mib"] is not None
        ]
        if peaks:
            peak, case = max(peaks, key=lambda pair: pair[0])
            what = f"{op}: peak memory beyond inputs and outputs (worst: {' '.join(case.name[1:])})"
            found.append(PerformanceTarget(what, 2.0, peak, unit=" MiB"))
    for case in results.of("scoring_step"):
        if case.ours:
            what = f"{' '.join(case.name)}: scoring over forward + backward"
            found.append(PerformanceTarget(what, 0.8, case.ours.info["ratio_to_plain"]))
    return found
