"""The job behind `taylor-kernels language`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from taylor_kernels.studies.language.measure import Cell, Measurement
from taylor_kernels.studies.language.pages import build_report, speed_table, summary_table
from taylor_kernels.studies.language.speed import measure_speed
from taylor_kernels.studies.language.text import load_text
from taylor_kernels.studies.results import circumstances, rounded, write_results

if TYPE_CHECKING:
    from taylor_kernels.studies.language.settings import LanguageSettings
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json


def run(settings: LanguageSettings, log: ProgressLog) -> tuple[Json, list[Table]]:
    """Do the study and write `report.html`, a PNG and `result.json` to `settings.out`.

    Returns:
        What result.json holds, and the tables that sum it up.

    Raises:
        Mistake: an option cannot be right; nothing was started.
        RuntimeError: a model computes something else when what was masked is removed.
    """
    settings.check()
    device, cache = settings.torch_device(), settings.open_cache()
    start, threads = time.perf_counter(), torch.get_num_threads()
    text = load_text().to(device)
    try:
        torch.set_num_threads(1)  # so that a result does not depend on the number of cores
        measured = Measurement(text, settings.recipe, settings.seed, cache, log)
        dense, facts = measured.dense()
        cells = settings.cells()
        first = settings.criteria[0]
        with log.task("prune", len(cells)) as advance:
            found = []
            for cell in cells:
                keep = cell.criterion == first and cell.draw == 0
                found.append(measured.cell(dense, cell, keep=keep))
                advance(f"{cell.words}: {found[-1]['bits']:.2f} bits a byte")
        kept = [Cell(kind, f, first) for kind in settings.kinds for f in settings.fractions]
        speed = measure_speed(measured, dense, kept)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    result: Json = {
        "schema": 1,
        "settings": settings.plain(),
        "recipe": asdict(settings.recipe),
        "text": {
            "train_bytes": len(text.train), "held_out_bytes": len(text.held_out),
            "train_modules": text.train_modules, "held_out_modules": text.held_out_modules,
        },
        "dense": facts,
        "cells": found,
        "speed": {"criterion": first} | speed,
    }  # fmt: skip
    seconds = time.perf_counter() - start
    result = rounded(result | circumstances(settings.command(), device, used, seconds))
    with log.task("report", 1) as advance:
        write_results(settings.out, result, build_report(result, settings.out))
        advance()
    return result, [summary_table(result), speed_table(result)]
