"""What pruning would take off a user's model, tried on a copy that is not trained on the way."""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.removing.removal import cut_model
from taylor_kernels.studies.own.pace import Pace
from taylor_kernels.studies.own.scoring import run_backward
from taylor_kernels.studies.own.settings import PruneSettings
from taylor_kernels.studies.own.task import Task, as_mistakes, figures
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.training import latencies

#: Stops on the way to the target, at each of which the filters are scored anew.
STOPS = 8
#: Rounds of timing, from the least to the most, and the seconds that they may take.
_ROUNDS, _SECONDS = (3, 100), 5.0


@dataclass(frozen=True)
class Plan:
    """What would go.

    Attributes:
        stops: {"filters", "params", "flops", the same with "_fraction", "loss", "ms"} of the dense
            model and of every stop.
        widths: layer -> (filters now, filters left at each stop).
        skipped: layer -> why none of its filters can go.
        blocks: {"left", "gone"}: residual blocks, where these may go.
    """

    stops: list[dict[str, float]]
    widths: dict[str, tuple[int, list[int]]]
    skipped: dict[str, str]
    blocks: dict[str, list[str]]


def blocks_of(pruner: Pruner) -> dict[str, list[str]]:
    """The residual blocks that are left, and those that went; none where they all stay."""
    gone = [name for record in pruner.history for name in record.blocks]
    return {"left": list(pruner.blocks), "gone": gone}


def planned(task: Task, settings: PruneSettings, log: ProgressLog) -> Plan:
    """Prune a copy to the targets without training it.

    Raises:
        Mistake: a target cannot be reached, or nothing can be pruned.
    """
    model = copy.deepcopy(task.model).train()
    dense = copy.deepcopy(task.model)
    with as_mistakes():
        pruner = Pruner(
            model,
            task.example,
            settings.chosen,
            every=settings.batches,
            **settings.of_pruner,
        )
    pace = Pace(pruner, STOPS)
    half = settings.amp_dtype() is torch.float16
    widths: dict[str, tuple[int, list[int]]] = {
        name: (width, []) for name, width in pruner.original_widths.items()
    }
    stops, models = [_facts(task, pruner, model, settings)], {"0": dense}
    with log.task("plan", STOPS) as advance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"compact\(\) has put new parameters")
        for epoch in itertools.count():
            for number, batch in task.loader.epoch(epoch):
                pace.set()
                with as_mistakes():
                    record = _score(
                        task, pruner, model, batch, f"on minibatch {number},", half=half
                    )
                if record is None:
                    continue
                pruner.compact()
                smaller = copy.deepcopy(task.model)
                cut_model(smaller, pruner.removal())
                models[str(len(stops))] = smaller
                stops.append(_facts(task, pruner, smaller, settings))
                for name, left in pruner.widths.items():
                    widths[name][1].append(left)
                advance(f"FLOPs {record.flops_fraction:.0%}")
                if record.done:
                    break
            if pruner.done:
                break
    for name, milliseconds in timed(models, task.inputs, log).items():
        stops[int(name)]["ms"] = milliseconds
    skipped = pruner.skipped
    pruner.close()
    return Plan(stops, widths, skipped, blocks_of(pruner))


def _score(
    task: Task, pruner: Pruner, model: nn.Module, batch: Any, where: str, *, half: bool
) -> Any:
    def loss() -> Tensor:
        return task.judge(model, batch, where).loss

    closure = loss if pruner.needs_closure else None
    scale = 1.0
    if closure is None:
        scale = run_backward(model, loss, pruner.skip, half=half)
    record = pruner.step(loss_scale=scale, closure=closure)
    model.zero_grad(set_to_none=True)
    return record


def _facts(
    task: Task, pruner: Pruner, model: nn.Module, settings: PruneSettings
) -> dict[str, float]:
    cost, batches = pruner.cost, itertools.islice(task.loader.epoch(0), min(settings.batches, 10))
    return {
        **{name: getattr(cost, name) for name in ("filters", "params", "flops")},
        **{f"{name}_fraction": value for name, value in cost.over(pruner.whole).items()},
        **figures(task.judge, model, batches),
    }


def timed(models: dict[str, nn.Module], inputs: Any, log: ProgressLog) -> dict[str, float]:
    """Median milliseconds of a forward pass on a minibatch, over as many rounds as there is time
    for."""
    start = time.perf_counter()
    latencies(models, inputs, repeats=2)
    rounds = int(_SECONDS / max((time.perf_counter() - start) / 5, 1e-9))
    rounds = min(max(rounds, _ROUNDS[0]), _ROUNDS[1])
    with log.task("latency", rounds) as advance:
        times = latencies(models, inputs, repeats=rounds, on_repeat=advance)
    return {name: quartiles["median"] for name, quartiles in times.items()}
