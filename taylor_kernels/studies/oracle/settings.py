"""What decides a run of `taylor-kernels compare`, and the checks before any work starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from taylor_kernels.criteria import criterion_names, get_criterion
from taylor_kernels.studies.options import (
    Mistake,
    check_both_or_none,
    check_writable,
    find_criteria,
)
from taylor_kernels.studies.oracle.late_norms import RECIPE, LateNorms
from taylor_kernels.studies.settings import StudySettings
from taylor_kernels.studies.training import Schedule

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json


@dataclass(frozen=True)
class OracleRecipe:
    """The study on digits: networks, how they are trained and how they are judged.

    `threads` is one, as in the demo: layers this small gain little from more.

    Attributes:
        seeds: a seed decides the split, the network's start and the order of its minibatches.
        epochs: long enough that the loss has come to rest: the expansion that the criteria are
            parts of is that around a minimum.
        batch_size: of training, and of the minibatches that the criteria square and average over.
        points: of a pruning curve, evenly up to 90% of the filters removed.
        rescored: the criteria that score again at every point of a curve.
        minibatches: on which they do.
        finetune_epochs: after every point.
        late_norms: how networks whose norms come late are scored beside; None for not at all.
    """

    architectures: tuple[str, ...] = ("cnn", "resnet")
    seeds: int = 3
    threads: int = 1
    epochs: int = 60
    batch_size: int = 32
    lr: float = 0.1
    weight_decay: float = 5e-4
    points: int = 18
    rescored: tuple[str, ...] = (
        "taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "random", "oracle",
    )  # fmt: skip
    minibatches: int = 8
    finetune_epochs: int = 1
    finetune_lr: float = 0.02
    timing_rounds: int = 8
    timing_seconds: float = 60.0
    late_norms: LateNorms | None = RECIPE

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.epochs, self.batch_size, self.lr, self.weight_decay)

    @property
    def finetune_schedule(self) -> Schedule:
        return Schedule(self.finetune_epochs, self.batch_size, self.finetune_lr, self.weight_decay)


FULL = OracleRecipe()
QUICK = OracleRecipe(
    architectures=("cnn",),
    seeds=1,
    epochs=25,
    points=9,
    minibatches=4,
    timing_rounds=3,
    late_norms=None,
)


@dataclass(frozen=True)
class OracleSettings(StudySettings):
    """A comparison as the user asked for it: of their model, or of digits where there is none.

    Attributes:
        model, data, loss: import paths, "package.module:name".
        criteria: names, or None for all that apply.
        sample: how many filters the oracle removes, or None for as many as the budget allows.
        batches: how many minibatches are taken from the user's loader.
        budget: seconds for the oracle, and again for the pruning curves.
        seed: of the sample and of random numbers while the model and the loader are made too.
    """

    out: Path = Path("runs/compare")
    model: str | None = None
    data: str | None = None
    loss: str | None = None
    criteria: tuple[str, ...] | None = None
    sample: int | None = None
    batches: int = 20
    budget: float = 600.0
    quick: bool = False

    @property
    def recipe(self) -> OracleRecipe:
        return QUICK if self.quick else FULL

    @property
    def compared(self) -> list[str]:
        """The criteria; what they are compared with is not one of them."""
        return [
            name
            for name in self.criteria or criterion_names()
            if get_criterion(name).statistic != "loss_change"
        ]

    def check(self) -> None:
        super().check()
        check_both_or_none(self.model, self.data)
        if self.model is None and self.loss is not None:
            raise Mistake("--loss: is for --model and --data; the digits study has its own")
        if self.model is not None and self.quick:
            raise Mistake(
                "--quick: shortens the digits study; for a model of yours use --sample and "
                "--batches"
            )
        if self.criteria is not None:
            find_criteria(self.criteria)
            if not self.compared:
                raise Mistake(
                    f"--criteria: {', '.join(self.criteria)} is what the others are compared with; "
                    "name another beside it"
                )
        if self.sample is not None and self.sample < 1:
            raise Mistake(f"--sample: {self.sample} is below 1")
        if self.batches < 1:
            raise Mistake(f"--batches: {self.batches} is below 1")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise Mistake(f"--budget: {self.budget:g} is not a positive number of seconds")
        check_writable(self.out)
        check_writable(self.cache_folder)

    def plan(
        self, *, rescored: tuple[str, ...], training: FineTuning | None = None, first: bool = True
    ) -> MeasurementPlan:
        """What is measured of a network; runtimes and single scores of the first one alone."""
        recipe = self.recipe
        return MeasurementPlan(
            criteria=self.compared,
            strict=self.criteria is not None,
            sample=self.sample,
            budget=self.budget,
            seed=self.seed,
            points=recipe.points,
            rescored=rescored,
            minibatches=recipe.minibatches,
            training=training,
            rounds=recipe.timing_rounds if first else 0,
            seconds=recipe.timing_seconds,
            keep_scores=first,
        )

    def command(self) -> str:
        """The command line that gives these settings, defaults left out."""
        plain = OracleSettings()
        parts = ["taylor-kernels compare"]
        for name in ("model", "data", "loss", "sample", "batches", "budget", "seed", "device"):
            value = getattr(self, name)
            if value != getattr(plain, name):
                parts.append(f"--{name} {value:g}" if name == "budget" else f"--{name} {value}")
        parts += [f"--criteria {name}" for name in self.criteria or ()]
        parts += ["--quick"] if self.quick else []
        return " ".join([*parts, f"--out {self.out}"])


@dataclass(frozen=True)
class FineTuning:
    """How a network is trained further between two prunings.

    Attributes:
        train: trains a model in place.
        by: the functions behind `train`, whose code decides what it does.
        settings: what else decides it.
    """

    train: Callable[[nn.Module], object]
    by: Sequence[object]
    settings: Json


@dataclass(frozen=True)
class MeasurementPlan:
    """What is measured of a network.

    Attributes:
        criteria: the names.
        strict: a criterion that cannot score the model is an error, not a note.
        sample, budget, seed: as in `OracleSettings`.
        points: of a pruning curve, at most.
        rescored: the criteria, "oracle" among them, that also score again at every point.
        minibatches: on which they do.
        training: after every point, in a further curve; None for none.
        rounds, seconds: of the runtimes; 0 rounds for none.
        keep_scores: put every filter's scores in the result.
    """

    criteria: Sequence[str]
    strict: bool
    sample: int | None
    budget: float
    seed: int
    points: int
    rescored: tuple[str, ...]
    minibatches: int
    training: FineTuning | None
    rounds: int
    seconds: float
    keep_scores: bool
