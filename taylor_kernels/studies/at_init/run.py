"""The job behind `taylor-kernels at-init`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from taylor_kernels.studies.at_init.findings import findings_table
from taylor_kernels.studies.at_init.measure import Measurement
from taylor_kernels.studies.at_init.pages import build_report, collapse_table, figures_table
from taylor_kernels.studies.at_init.problem import cnn_on_digits
from taylor_kernels.studies.at_init.settings import AtInitSettings
from taylor_kernels.studies.at_init.users_problem import users_problem
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import circumstances, rounded, write_results

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json


def run(settings: AtInitSettings, log: ProgressLog) -> tuple[Json, list[Table]]:
    """Compare, and write `report.html`, a PNG and `result.json` to `settings.out`.

    Returns:
        What result.json holds, and the tables that sum it up.

    Raises:
        Mistake: an option cannot be right, or what it names cannot be used.
    """
    settings.check()
    device = settings.torch_device()
    cache = settings.open_cache()
    start = time.perf_counter()
    threads = torch.get_num_threads()
    digits = settings.model is None
    try:
        if digits:
            torch.set_num_threads(1)  # networks this small are slower on more
        points, dense = [], []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            if digits:
                problem = cnn_on_digits(seed, settings.batches, device)
            else:
                problem = users_problem(settings, seed, device)
            measured = Measurement(problem, settings.recipe, cache, log)
            dense.append({"seed": seed} | measured.dense())
            for frame in settings.frames:
                points += measured.curve(frame, settings.sparsity)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    result: Json = {
        "schema": 1,
        "kind": "digits" if digits else "user_model",
        "name": problem.name,
        "settings": settings.plain(),
        "weights": problem.weights(),
        "dense": dense,
        "points": points,
    }
    seconds = time.perf_counter() - start
    result = rounded(result | circumstances(settings.command(), device, used, seconds))
    tables = [figures_table(points, dense), collapse_table(points)]
    if (said := findings_table(points)).rows:
        tables.append(said)
    with log.task("report", 1) as advance:
        write_results(settings.out, result, build_report(result, settings.out))
        advance()
    return result, tables
