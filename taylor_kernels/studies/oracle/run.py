"""The job behind `taylor-kernels compare`: measure networks, write the result and its report."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from taylor_kernels.progress import ProgressLog
from taylor_kernels.report import Table, render
from taylor_kernels.studies.oracle import findings
from taylor_kernels.studies.oracle.digits import ARCHITECTURES, digits_problem, fine_tune
from taylor_kernels.studies.oracle.measure import Plan, Training, measure
from taylor_kernels.studies.oracle.pages import build_report
from taylor_kernels.studies.oracle.pieces import Pieces, write_whole
from taylor_kernels.studies.oracle.settings import FULL, Settings
from taylor_kernels.studies.oracle.tables import summary_table, target_table
from taylor_kernels.studies.oracle.yours import your_problem
from taylor_kernels.system import cpu_model, package_versions

Json = dict[str, Any]
#: A user's model is pruned and scored again under these, of the criteria that are compared.
_RESCORED = ("taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "random")


def run(settings: Settings, log: ProgressLog) -> tuple[Json, list[Table]]:
    """Compare, and write `report.html`, PNGs and `result.json` to `settings.out`.

    Returns:
        What result.json holds, and the tables that sum it up.

    Raises:
        Mistake: an option cannot be right, or what it names cannot be used.
    """
    device = settings.check()
    pieces = Pieces(settings.cache)
    if settings.force:
        pieces.clear()
    start = time.perf_counter()
    threads = torch.get_num_threads()
    try:
        result = (_digits if settings.model is None else _yours)(settings, device, pieces, log)
        used = torch.get_num_threads()  # the user's module may have set it
    finally:
        torch.set_num_threads(threads)
    result |= _circumstances(settings, device, used, time.perf_counter() - start)
    tables = [summary_table(result)]
    if result["kind"] == "digits":
        tables.append(target_table(result))
        result["targets"] = [asdict(target) for target in findings.targets(result)]
    with log.task("report", 1) as advance:
        out = settings.out
        write_whole(out / "report.html", render(build_report(result, out)))
        write_whole(out / "result.json", readable(result))
        advance()
    return result, tables


def _digits(settings: Settings, device: torch.device, pieces: Pieces, log: ProgressLog) -> Json:
    recipe = settings.recipe
    torch.set_num_threads(recipe.threads)
    networks = []
    seeds = range(settings.seed, settings.seed + recipe.seeds)
    decides = ("finetune_epochs", "finetune_lr", "batch_size", "weight_decay", "threads")
    for architecture in recipe.architectures:
        for seed in seeds:
            problem, facts = digits_problem(architecture, seed, recipe, device, pieces, log)
            first = seed == settings.seed
            training = Training(
                partial(fine_tune, seed=seed, recipe=recipe, device=device),
                {name: getattr(recipe, name) for name in decides},
            )
            plan = Plan(
                criteria=settings.compared,
                strict=settings.criteria is not None,
                sample=settings.sample,
                budget=settings.budget,
                seed=settings.seed,
                points=recipe.points,
                rescored=recipe.rescored,
                minibatches=recipe.minibatches,
                training=training,
                rounds=recipe.timing_rounds if first else 0,
                seconds=recipe.timing_seconds,
                keep_scores=first,
            )
            found = measure(problem, plan, pieces, log)
            networks.append({"architecture": architecture, "seed": seed, **facts, **found})
    words = " and ".join(ARCHITECTURES[name][1] for name in recipe.architectures)
    return {
        "schema": 1,
        "kind": "digits",
        "settings": asdict(recipe) | {"seeds": list(seeds), "words": words},
        "networks": networks,
    }


def _yours(settings: Settings, device: torch.device, pieces: Pieces, log: ProgressLog) -> Json:
    problem, left_out = your_problem(settings, device)
    for layer, why in left_out.items():
        log.say(f"layer {layer} is left out: {why}")
    plan = Plan(
        criteria=settings.compared,
        strict=settings.criteria is not None,
        sample=settings.sample,
        budget=settings.budget,
        seed=settings.seed,
        points=FULL.points,
        rescored=_RESCORED,
        minibatches=FULL.minibatches,
        training=None,
        rounds=FULL.timing_rounds,
        seconds=FULL.timing_seconds,
        keep_scores=True,
    )
    found = measure(problem, plan, pieces, log)
    name = problem.name.partition(":")[2]
    return {
        "schema": 1,
        "kind": "yours",
        "settings": {"minibatches": FULL.minibatches, "left_out": left_out},
        "networks": [{"architecture": name, "seed": settings.seed, **found}],
    }


def _circumstances(settings: Settings, device: torch.device, threads: int, seconds: float) -> Json:
    names = ("taylor-kernels", "torch", "scipy", "scikit-learn", "numpy")
    return {
        "command": settings.command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | package_versions(*names),
        "machine": {
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cpu": cpu_model(),
            "threads": threads,
        },
    }


def readable(result: Json) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(result, indent=1)
    flat = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    return flat + "\n"
