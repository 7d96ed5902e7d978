"""What decides a run of the demo, and the checks that are made before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

import taylor_kernels as tk
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.data import IMAGE_SHAPE
from taylor_kernels.studies.networks import DigitsResNet
from taylor_kernels.studies.options import Mistake, check_writable, find_criteria
from taylor_kernels.studies.settings import StudySettings
from taylor_kernels.studies.training import Schedule

DEFAULT_CRITERIA = ("taylor_fo_bn", "magnitude_l2", "random")


@dataclass(frozen=True)
class PruningRecipe:
    """How the networks are trained and pruned.

    Every `every` minibatches `per_step` of the filters go. `threads` is one because layers this
    small gain a quarter from a second thread and lose tenfold when another process holds its core;
    and then a seed's result does not depend on the number of cores.
    """

    threads: int = 1

    width: int = 16
    blocks: int = 2
    batch_size: int = 64
    weight_decay: float = 5e-4
    dense_epochs: int = 20
    dense_lr: float = 0.1
    every: int = 10
    per_step: float = 0.02
    prune_lr: float = 0.01
    finetune_epochs: int = 10
    finetune_lr: float = 0.02
    latency_batch: int = 256
    latency_repeats: int = 40

    @property
    def dense_schedule(self) -> Schedule:
        return Schedule(self.dense_epochs, self.batch_size, self.dense_lr, self.weight_decay)

    @property
    def finetune_schedule(self) -> Schedule:
        return Schedule(self.finetune_epochs, self.batch_size, self.finetune_lr, self.weight_decay)


FULL = PruningRecipe()
QUICK = PruningRecipe(dense_epochs=8, every=4, per_step=0.04, finetune_epochs=3, latency_repeats=15)


@dataclass(frozen=True)
class PruningSettings(StudySettings):
    """A run of the demo as the user asked for it.

    Attributes:
        seeds: how many seeds are run: `seed`, `seed` + 1, ...; a seed decides the pruning too.
        flops: the fraction of FLOPs to keep, in (0, 1).
    """

    out: Path = Path("runs/demo")
    seeds: int = 3
    flops: float = 0.5
    criteria: tuple[str, ...] = DEFAULT_CRITERIA
    recipe: PruningRecipe = FULL

    def check(self) -> None:
        super().check()
        if not (math.isfinite(self.flops) and 0 < self.flops < 1):
            raise Mistake(
                f"--flops: {self.flops:g} is not between 0 and 1; 0.5 keeps half of the FLOPs"
            )
        if self.seeds < 1:
            raise Mistake(f"--seeds: {self.seeds} is below 1")
        for criterion in find_criteria(self.criteria):
            if not get_statistic(criterion.statistic).prunable:
                raise Mistake(
                    f"--criteria: {criterion.name!r} needs a pass over the data per filter, which "
                    "the demo's loop does not do; choose another"
                )
        _check_reachable(self)
        check_writable(self.out)
        check_writable(self.cache_folder)

    def command(self) -> str:
        """The command line that gives these settings."""
        parts = ["taylor-kernels demo", f"--out {self.out}"]
        if self.recipe != FULL:
            parts.append("--quick")
        parts += [f"--seed {self.seed}", f"--seeds {self.seeds}", f"--flops {self.flops:g}"]
        parts += [f"--criteria {name}" for name in self.criteria]
        return " ".join([*parts, f"--device {self.device}"])


def _check_reachable(settings: PruningSettings) -> None:
    recipe = settings.recipe
    model, image = DigitsResNet(recipe.width, recipe.blocks), torch.zeros(1, *IMAGE_SHAPE)
    try:
        tk.Pruner(model, image, settings.criteria[0], flops=settings.flops, verify=False).close()
    except ValueError as error:
        raise Mistake(f"--{error}") from None
