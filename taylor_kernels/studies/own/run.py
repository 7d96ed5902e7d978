"""The jobs behind `taylor-kernels score` and `taylor-kernels prune`."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taylor_kernels.studies.own.artifacts import write_artifacts
from taylor_kernels.studies.own.course import JUDGED
from taylor_kernels.studies.own.pages import prune_report, score_report, tables
from taylor_kernels.studies.own.parts import users_model
from taylor_kernels.studies.own.paths import find
from taylor_kernels.studies.own.plan import blocks_of, planned, timed
from taylor_kernels.studies.own.processes import Processes, check_alone, processes
from taylor_kernels.studies.own.scoring import Scores, scored
from taylor_kernels.studies.own.settings import OwnSettings, PruneSettings, ScoreSettings
from taylor_kernels.studies.own.tables import (
    blocks_table,
    layers_table,
    score_table,
    stays_table,
    stops_table,
)
from taylor_kernels.studies.own.task import Task, as_mistakes, users_task
from taylor_kernels.studies.own.training import Training
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import circumstances, rounded, write_results
from taylor_kernels.tracing import trace

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json


def run_score(settings: ScoreSettings, log: ProgressLog) -> tuple[Json, list[Table]]:
    """Score, and write `scores.safetensors`, `result.json`, `report.html` and a PNG.

    Returns:
        What result.json holds, and the tables that sum it up.

    Raises:
        Mistake: an option cannot be right, or what it names cannot be used.
        Stopped: the user asked for it; a checkpoint is there.
    """
    start = time.perf_counter()
    settings.check()
    check_alone("score")
    settings.check_folder()
    device = settings.torch_device()
    task = users_task(settings, device, limit=None)
    with log.task("trace", 1) as advance, as_mistakes():
        skipped = trace(task.model, task.example).skipped
        advance()
    found = scored(task, settings, log, keep=True)
    out = settings.out
    result = _about(settings, found) | {"kind": "score", "skipped": skipped}
    result = _finished(result, settings, device, start)
    with log.task("report", 1) as advance:
        found.save(out / "scores.safetensors", _metadata(settings))
        write_results(out, result, score_report(result, found.values, out))
        advance()
    settings.checkpoint.unlink(missing_ok=True)
    printed = [score_table(result)]
    return result, printed + ([stays_table(skipped)] if skipped else [])


def run_prune(settings: PruneSettings, log: ProgressLog) -> tuple[Json, list[Table]]:
    """Prune and fine-tune, and write the model in several forms beside the report.

    Processes that torchrun has started train one model: each reads its part of every minibatch of
    --data, and the first one writes and prints.

    Returns:
        What result.json holds, and the tables that sum it up; of the other processes nothing.

    Raises:
        Mistake: an option cannot be right, or what it names cannot be used.
        Stopped: the user asked for it; a checkpoint is there.
    """
    start = time.perf_counter()
    settings.check()
    with processes(settings.device) as team:
        return _pruned(settings, log, team, start)


def _pruned(
    settings: PruneSettings, log: ProgressLog, team: Processes | None, start: float
) -> tuple[Json, list[Table]]:
    first = team is None or team.first
    if settings.dry_run and not first:
        return {}, []
    together = nullcontext() if team is None or settings.dry_run else team.together("begin")
    with together:
        if not settings.dry_run:
            settings.check_folder()
        device = settings.torch_device()
        task = users_task(settings, device, limit=settings.steps)
        if settings.dry_run:
            return _dry_run(task, settings, log)
        out = settings.out
        dense = copy.deepcopy(task.model)
        with log.task("trace", 1) as advance:
            training = Training(task, settings, log, team)
            advance()
        found = scored(replace(task, model=dense), settings, log, keep=False)
    with nullcontext() if team is None else team.watching():
        model = training.run()
    pruner = training.pruner
    pruner.close()
    if not first:  # what is left to do is to write
        return {}, []
    times = timed({"dense": dense, "final": model}, task.inputs, log)
    with log.task("files", 1) as advance:
        files = write_artifacts(
            out, pruner, task.inputs, partial(_fresh, settings.model, dense, model)
        )
        found.save(out / "scores.safetensors", _metadata(settings))
        advance()
    for file in files:
        if file.missing:
            log.say(f"{file.name} is not written: {file.missing}")
    result = _about(settings, found) | _outcome(training, times)
    result |= {"files": [asdict(file) for file in files]}
    if team is not None:
        result |= {"processes": team.size}
    result = _finished(result, settings, device, start)
    with log.task("report", 1) as advance:
        write_results(out, result, prune_report(result, found.values, files, out))
        advance()
    if files[0].missing:  # pruned.safetensors: without it nothing else can be trained further
        log.say(
            f"the trained model is in {settings.checkpoint} alone, which stays; once the reason "
            "above is mended, the same command with --resume writes the files"
        )
    else:
        settings.checkpoint.unlink(missing_ok=True)
    return result, tables(result, files)


def _dry_run(task: Task, settings: PruneSettings, log: ProgressLog) -> tuple[Json, list[Table]]:
    plan = planned(task, settings, log)
    widths = {name: [before, left[-1]] for name, (before, left) in plan.widths.items()}
    result = {
        "schema": 1, "kind": "plan", "criterion": settings.criterion, "targets": settings.targets,
        **rounded(asdict(plan)),
    }  # fmt: skip
    printed = [stops_table(plan.stops, settings.criterion, task.per_example), layers_table(widths)]
    printed += blocks_table(plan.blocks)
    return result, printed + ([stays_table(plan.skipped)] if plan.skipped else [])


def _fresh(path: str, dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """The model as it is made; where a path gives the one that was pruned again, a copy."""
    if isinstance(find("--model", path), nn.Module):
        return copy.deepcopy(dense)
    made = users_model(path)
    return copy.deepcopy(dense) if made is pruned else made


def _outcome(training: Training, times: dict[str, float]) -> Json:
    """What became of the model."""
    pruner, settings, course = training.pruner, training.settings, training.course.points
    whole, cost = pruner.whole, pruner.cost
    at = max(i for i, p in enumerate(course) if p["minibatch"] <= training.pruned_at)
    removed: dict[str, list[int]] = {}
    for record in pruner.history:
        for layer, filters in record.removed.items():
            removed.setdefault(layer, []).extend(filters)
    left = cost.over(whole)

    def facts(point: dict[str, float], counts: Any, fractions: dict[str, float]) -> Json:
        names = ("filters", "params", "flops")
        return (
            {name: getattr(counts, name) for name in names}
            | {f"{name}_fraction": fractions[name] for name in names}
            | {name: point[name] for name in ("loss", "accuracy") if name in point}
        )

    dense = facts(course[0], whole, dict.fromkeys(("filters", "params", "flops"), 1.0))
    judged = "all of `--val`" if settings.val else f"the first {JUDGED} minibatches of `--data`"
    return {
        "kind": "prune",
        "targets": settings.targets,
        "dense": dense | {"ms": times["dense"]},
        "pruned": facts(course[at], cost, left),
        "final": facts(course[-1], cost, left) | {"ms": times["final"]},
        "course": course,
        "pruned_at": training.pruned_at,
        "every": training.every,
        "finetune": settings.finetune,
        "optimizer": type(training.optimizer).__name__,
        "widths": {n: [w, pruner.widths[n]] for n, w in pruner.original_widths.items()},
        "removed": {layer: sorted(filters) for layer, filters in removed.items()},
        "blocks": blocks_of(pruner),
        "skipped": pruner.skipped,
        "flops_of": "one example" if training.task.per_example else "a minibatch",
        "judged_on": f"Judged in eval mode on {judged}.",
    }


def _about(settings: OwnSettings, found: Scores) -> Json:
    """What a result says of its settings and its scores."""
    return {
        "schema": 1,
        "model": settings.model,
        "criterion": settings.criterion,
        "minibatches": found.minibatches,
        "layers": {
            name: _layer(values, found.errors[name]) for name, values in found.values.items()
        },
        "notes": found.notes,
    }


def _layer(values: Tensor, errors: Tensor) -> Json:
    """Figures of one layer's scores; None where it has none."""
    seen = values[values.isfinite()].double()
    facts: Json = {"filters": values.numel()}
    if not seen.numel():
        return facts | dict.fromkeys(("least", "median", "greatest", "sum", "error"))
    relative = (errors / values.abs()).double()
    relative = relative[relative.isfinite()]
    return facts | {
        "least": seen.min().item(),
        "median": seen.median().item(),
        "greatest": seen.max().item(),
        "sum": seen.sum().item(),
        "error": relative.median().item() if relative.numel() else None,
    }


def _metadata(settings: OwnSettings) -> dict[str, str]:
    return {"criterion": settings.criterion, "model": settings.model, "data": settings.data}


def _finished(
    result: Json, settings: OwnSettings, device: torch.device, start: float
) -> dict[str, Any]:
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    return rounded(result) | circumstances(settings.command(), device, threads, seconds)


def files_of(folder: Path) -> list[Path]:
    """The files of a run, those that are there."""
    names = ("report.html", "result.json", "scores.safetensors", "pruned.safetensors",
             "pruned.pt2", "pruned.onnx")  # fmt: skip
    return [folder / name for name in names if (folder / name).exists()]
