"""What gpu-check found, in the few lines that are read first.

python -m tools.gpu_summary bench/results/gpu-check/gpu-check.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Characters of the whole and of a line; lines of a step's failures, and of the cases.
LENGTH, WIDTH = 10_000, 120
FAILURES, CASES = 10, 50


def summary(report: dict[str, Any]) -> str:
    """The machine, what it lacks, the failures, the figures; the verdict on each step last."""
    machine = report["machine"]
    lines = [f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}"]
    lines += report["missing"]
    for step in report["steps"]:
        lines += shortened(list(failures(step)), FAILURES)
    if report.get("bench"):
        lines += ["case: provider  device time  host time  of the copy bandwidth  over the floor"]
        lines += shortened(list(figures(report["bench"])), CASES)
    steps = [
        f"{step['step']:<14} {verdict(step):<10} "
        f"{step['seconds']:>6} s  {' | '.join(step['last_lines'][:3])}"
        for step in report["steps"]
    ]
    top, bottom = ("\n".join(line[:WIDTH] for line in each) for each in (lines, steps))
    return f"{top[: LENGTH - len(bottom)]}\n\n{bottom}"


def verdict(step: dict[str, Any]) -> str:
    return "pass" if step["ok"] else f"FAIL ({step['code']})"


def failures(step: dict[str, Any]) -> Iterator[str]:
    """Tests that failed; without any, how those of its commands ended that failed."""
    lines = step.get("failed") or [line for end in step.get("ends", []) for line in end]
    return (f"{step['step']}: {line}" for line in lines)


def figures(bench: dict[str, Any]) -> Iterator[str]:
    """A line for each provider of each case."""
    for case in bench["benchmarks"]:
        info = case["extra_info"]
        host, copy = info.get("host_s"), info.get("percent_of_copy")
        yield (
            f"{' '.join(info['case'])}: {info['provider']}  {case['stats']['median'] * 1e6:.1f} µs"
            + ("" if host is None else f"  {host * 1e6:.0f} µs")
            + ("" if copy is None else f"  {copy:.0f}%")
            + ("" if not info.get("ratio_to_floor") else f"  {info['ratio_to_floor']:.2f}×")
        )


def shortened(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    return [*lines[:most], f"... and {len(lines) - most} more: see gpu-check.json"]


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
