"""The demo job: dense networks, pruned copies of them, measurements, files."""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.data import IMAGE_SHAPE, Digits, load_digits, minibatches
from taylor_kernels.studies.export import export
from taylor_kernels.studies.networks import DigitsResNet
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.pruning.pages import build_report, result_table
from taylor_kernels.studies.pruning.settings import PruningSettings
from taylor_kernels.studies.results import circumstances, write_results
from taylor_kernels.studies.training import (
    count_flops,
    count_parameters,
    evaluate,
    latencies,
    layer_widths,
    sgd,
    train,
)
from taylor_kernels.studies.weights import trained_network

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json


def run(settings: PruningSettings, log: ProgressLog) -> tuple[Json, Table]:
    """Do the demo and write `report.html`, PNGs, `result.json` and `pruned.pt2` to `settings.out`.

    Returns:
        What result.json holds, and the table that sums it up.

    Raises:
        Mistake: an option cannot be right; nothing was started.
    """
    settings.check()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.recipe.threads)
    try:
        return _run(settings, log)
    finally:
        torch.set_num_threads(threads)


def _run(settings: PruningSettings, log: ProgressLog) -> tuple[Json, Table]:
    start = time.perf_counter()
    device, out = settings.torch_device(), settings.out
    cache = settings.open_cache()
    result: Json = {"schema": 1, "settings": _facts(settings)}
    result |= {"dense": [], "runs": [], "importance": {}}
    shown: dict[str, nn.Module] = {}

    for seed in range(settings.seed, settings.seed + settings.seeds):
        data = load_digits(seed).to(device)
        dense, facts = dense_network(settings, seed, data, cache, log)
        result["dense"].append(facts)
        first = seed == settings.seed
        if first:
            shown["dense"] = dense
            result["data"] = {"train_images": len(data.train), "test_images": len(data.test)}
        for criterion in settings.criteria:
            if first and criterion != "random":
                result["importance"][criterion] = layer_scores(dense, data, criterion, settings)
            pruned, facts = prune(dense, data, criterion, settings, seed, log)
            result["runs"].append(facts)
            if first:
                shown[criterion] = pruned

    result["latency_ms"] = _measure_latency(shown, settings, log)
    with log.task("export and report", 2) as advance:
        exported = settings.criteria[0]
        facts = export(shown[exported], out / "pruned.pt2")
        result["files"] = {"pruned.pt2": {"criterion": exported, "seed": settings.seed, **facts}}
        advance()
        seconds, threads = time.perf_counter() - start, torch.get_num_threads()
        result |= circumstances(settings.command(), device, threads, seconds)
        write_results(out, result, build_report(result, out))
        advance()
    return result, result_table(result)


def dense_network(
    settings: PruningSettings, seed: int, data: Digits, cache: Cache, log: ProgressLog
) -> tuple[nn.Module, Json]:
    """The trained dense network of a seed, from the cache where it is there, and its facts."""
    recipe, start = settings.recipe, time.perf_counter()
    made = trained_network(
        partial(DigitsResNet, recipe.width, recipe.blocks),
        seed,
        data.train,
        recipe.dense_schedule,
        cache,
        log,
        label=f"seed {seed}: train dense",
    )
    accuracy = evaluate(made.model, data.test)
    origin = " (from the cache)" if made.cached else ""
    log.say(f"seed {seed}: dense test accuracy {accuracy:.2%}{origin}")
    facts = _size(made.model, data) | {
        "seed": seed,
        "accuracy": accuracy,
        "cached": made.cached,
        "seconds": time.perf_counter() - start,
        "file": str(made.file.relative_to(settings.out)),
    }
    return made.model, facts


def layer_scores(dense: nn.Module, data: Digits, criterion: str, settings: PruningSettings) -> Json:
    """Scores of the dense network's filters, a list per layer, over one pass of the training data.

    In train mode, as in the pruning loop; on a copy, so that BatchNorm's statistics stay.
    """
    model = copy.deepcopy(dense).train()
    layers = [name for name in layer_widths(model) if name != "head"]
    importance = tk.Importance(model, criterion, layers=layers)
    for images, labels in minibatches(
        data.train, settings.recipe.batch_size, torch.Generator().manual_seed(settings.seed)
    ):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        importance.update()
    scores = importance.compute()
    importance.close()
    return {name: [float(f"{v:.6g}") for v in scores[name].tolist()] for name in layers}


def prune(
    dense: nn.Module,
    data: Digits,
    criterion: str,
    settings: PruningSettings,
    seed: int,
    log: ProgressLog,
) -> tuple[nn.Module, Json]:
    """A copy of `dense` pruned to the target and fine-tuned, and the facts of how it went."""
    recipe = settings.recipe
    start = time.perf_counter()
    torch.manual_seed(seed)  # `random` draws from it
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(dense).train()
    optimizer = sgd(model, recipe.prune_lr, recipe.weight_decay)
    pruner = tk.Pruner(
        model,
        data.train.images[:1],
        criterion=criterion,
        flops=settings.flops,
        every=recipe.every,
        per_step=recipe.per_step,
        optimizer=optimizer,
    )
    steps = [_step(0, 1.0, evaluate(model, data.test))]
    count = itertools.count(1)
    with log.task(f"seed {seed}: {criterion}, prune", 100) as advance:
        while not pruner.done:
            for images, labels in minibatches(data.train, recipe.batch_size, generator):
                optimizer.zero_grad()

                def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    return F.cross_entropy(model(images), labels)

                loss().backward()
                minibatch = next(count)
                record = pruner.step(closure=loss if pruner.needs_closure else None)
                if record is not None:
                    kept, accuracy = record.flops_fraction, evaluate(model, data.test)
                    gone = (steps[-1]["flops"] - kept) / (1 - settings.flops)
                    advance(f"FLOPs {kept:.1%}, accuracy {accuracy:.1%}", 100 * gone)
                    steps.append(_step(minibatch, kept, accuracy))
                if pruner.done:
                    break
                optimizer.step()
    before = layer_widths(dense)
    model = pruner.compact()
    unrecovered = evaluate(model, data.test)
    with log.task(f"seed {seed}: {criterion}, fine-tune", recipe.finetune_epochs) as advance:
        train(
            model,
            data.train,
            recipe.finetune_schedule,
            generator=generator,
            optimizer=optimizer,
            on_epoch=advance,
        )
    after = layer_widths(model)
    facts = _size(model, data) | {
        "criterion": criterion,
        "seed": seed,
        "accuracy": evaluate(model, data.test),
        "accuracy_before_finetuning": unrecovered,
        "steps": steps,
        "removed": _removed(pruner),
        "widths": {name: [before[name], after[name]] for name in before},
        "seconds": time.perf_counter() - start,
    }
    return model, facts


def _facts(settings: PruningSettings) -> Json:
    """What the result says of its settings."""
    return {
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "flops": settings.flops,
        "criteria": list(settings.criteria),
        "recipe": asdict(settings.recipe),
    }


def _size(model: nn.Module, data: Digits) -> Json:
    flops = count_flops(model, data.test.images[:1])
    return {"parameters": count_parameters(model), "flops": flops}


def _removed(pruner: tk.Pruner) -> dict[str, list[int]]:
    """Layer -> the filters that went, numbered as in the dense network."""
    removed: dict[str, list[int]] = {}
    for record in pruner.history:
        for layer, filters in record.removed.items():
            removed.setdefault(layer, []).extend(filters)
    return {layer: sorted(filters) for layer, filters in removed.items()}


def _step(minibatch: int, flops: float, accuracy: float) -> Json:
    return {"minibatch": minibatch, "flops": flops, "accuracy": accuracy}


def _measure_latency(
    models: dict[str, nn.Module], settings: PruningSettings, log: ProgressLog
) -> Json:
    recipe = settings.recipe
    shape = (recipe.latency_batch, *IMAGE_SHAPE)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = images.to(settings.torch_device())
    with log.task(f"latency, batch {recipe.latency_batch}", recipe.latency_repeats) as advance:
        return latencies(models, images, repeats=recipe.latency_repeats, on_repeat=advance)
