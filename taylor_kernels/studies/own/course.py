"""How a pruning goes: what is left of a user's model, and how good that is, from point to point."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from taylor_kernels.pruning import Pruner
from taylor_kernels.studies.own.parts import Minibatches, to_device
from taylor_kernels.studies.own.settings import PruneSettings
from taylor_kernels.studies.own.task import Task, figures

#: Without --val so many minibatches of --data are judged on; they are kept, on the CPU.
JUDGED = 10
#: So often the model is judged on its way to the target; every pruning would take too long.
_POINTS = 12


class Course:
    """The points of a run, each on the same minibatches.

    Attributes:
        points: {"minibatch", "flops", "params", "filters", "loss", perhaps "accuracy"} of each.
    """

    def __init__(self, task: Task, settings: PruneSettings) -> None:
        self.points: list[dict[str, float]] = []
        self._judge = task.judge
        self._val: Minibatches | None = None
        self._judged: list[tuple[int, Any]] = []
        if settings.val is not None:
            device = next(task.model.parameters()).device
            self._val = Minibatches(
                "--val", settings.val, seed=settings.seed, limit=None, device=device, whole=True
            )
        else:
            cpu = torch.device("cpu")
            first = itertools.islice(task.loader.epoch(0), JUDGED)
            self._judged = [(number, to_device(batch, cpu)) for number, batch in first]

    def add(self, pruner: Pruner, minibatch: int) -> None:
        """Judge the model; what that draws at random does not matter to the run."""
        model = pruner.model
        device = next(model.parameters()).device
        batches: Iterable[tuple[int, Any]] = self._judged
        if self._val is not None:
            batches = self._val.epoch(0)
        found = figures(self._judge, model, ((n, to_device(b, device)) for n, b in batches))
        self.points.append({"minibatch": minibatch, **pruner.cost.over(pruner.whole), **found})

    def is_due(self, pruner: Pruner) -> bool:
        """Whether the pruner is far enough from the last point, on its way to a target."""
        cost = pruner.cost.over(pruner.whole)
        return any(
            self.points[-1][name] - cost[name] >= (1 - target) / _POINTS
            for name, target in pruner.targets.items()
            if target < 1
        )
