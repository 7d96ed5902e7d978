"""Latency of a batch in networks of the shapes that adaptive pruning and its baselines end with.

`python -m bench.methods adaptive --speed` keeps what this measures. Each network is built anew from
the kept runs, its widths and blocks, so that a busy machine at the time of a run changes nothing.
"""

from __future__ import annotations

import json
from statistics import mean

import torch

from bench.methods import KEPT, ROOT
from taylor_kernels.studies.methods.adaptive import ADAPTIVE
from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of
from taylor_kernels.studies.methods.shapes import milliseconds, speed_words
from taylor_kernels.studies.methods.study import THREADS
from taylor_kernels.studies.results import Json


def measure() -> Json:
    return latencies_of("adaptive", ADAPTIVE)


def latencies_of(name: str, way: str) -> Json:
    """Of each problem and way of a study the latency of each seed's network, over the dense one's.

    Args:
        way: what the words for the table over all methods speak of.
    """
    result = json.loads((ROOT / KEPT / f"{name}.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        found = {", ".join(problem): _of(result, problem) for problem in problems_of(result)}
    finally:
        torch.set_num_threads(threads)
    return {"words": speed_words(found, way), "relative": found}


def _of(result: Json, problem: tuple[str, str]) -> dict[str, list[float]]:
    runs = [run for way in ways_of(result) for run in runs_of(result, way, problem)]
    times = milliseconds(runs)
    dense = mean(t for run, t in zip(runs, times, strict=True) if run["way"] == "dense")
    return {
        way: [t / dense for run, t in zip(runs, times, strict=True) if run["way"] == way]
        for way in ways_of(result)
    }
