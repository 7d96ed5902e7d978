"""Latency of a batch in networks of the shapes that adaptive pruning and its baselines end with.

`python -m bench.methods adaptive --speed` keeps what this measures. Each network is built anew from
the kept runs, its widths and blocks, so that a busy machine at the time of a run changes nothing.
"""

from __future__ import annotations

import json
from statistics import mean

import torch

from bench.methods import KEPT, ROOT
from taylor_kernels.studies.methods.adaptive import ADAPTIVE, milliseconds
from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of
from taylor_kernels.studies.methods.study import THREADS
from taylor_kernels.studies.results import Json


def measure() -> Json:
    """Of each problem and way the latency of each seed's network, over the dense network's."""
    result = json.loads((ROOT / KEPT / "adaptive.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        found = {", ".join(problem): _of(result, problem) for problem in problems_of(result)}
    finally:
        torch.set_num_threads(threads)
    # Networks of one shape differ by some percent: said where the slowest is faster than all dense.
    said = [
        f"{1 / mean(each[ADAPTIVE]):.2f}× ({name})"
        for name, each in found.items()
        if max(each[ADAPTIVE]) < min(each["dense"])
    ]
    return {"words": f"a batch faster by {', '.join(said)}" if said else "–", "relative": found}


def _of(result: Json, problem: tuple[str, str]) -> dict[str, list[float]]:
    runs = [run for way in ways_of(result) for run in runs_of(result, way, problem)]
    times = milliseconds(runs)
    dense = mean(t for run, t in zip(runs, times, strict=True) if run["way"] == "dense")
    return {
        way: [t / dense for run, t in zip(runs, times, strict=True) if run["way"] == way]
        for way in ways_of(result)
    }
