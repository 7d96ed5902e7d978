"""What decides a run of `taylor-kernels compare`, and the checks before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from taylor_kernels.criteria import criterion_names, get_criterion
from taylor_kernels.options import Mistake, check_seed, check_writable, find_criteria, find_device


@dataclass(frozen=True)
class Recipe:
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


FULL = Recipe()
QUICK = Recipe(architectures=("cnn",), seeds=1, epochs=25, points=9, minibatches=4, timing_rounds=3)


@dataclass(frozen=True)
class Settings:
    """A comparison as the user asked for it: of their model, or of digits where there is none.

    Attributes:
        out: the folder to write to.
        model, data, loss: import paths, "package.module:name".
        criteria: names, or None for all that apply.
        sample: how many filters the oracle removes, or None for as many as the budget allows.
        batches: how many minibatches are taken from the user's loader.
        budget: seconds for the oracle, and again for the pruning curves.
        seed: of the sample and of random numbers while the model and the loader are made; of the
            study, the first of its seeds.
        force: forget what earlier runs have finished.
    """

    out: Path = Path("runs/compare")
    model: str | None = None
    data: str | None = None
    loss: str | None = None
    criteria: tuple[str, ...] | None = None
    sample: int | None = None
    batches: int = 20
    budget: float = 600.0
    seed: int = 0
    device: str = "auto"
    quick: bool = False
    force: bool = False

    @property
    def cache(self) -> Path:
        """Where what is finished is kept."""
        return self.out / "cache"

    @property
    def recipe(self) -> Recipe:
        return QUICK if self.quick else FULL

    @property
    def compared(self) -> list[str]:
        """The criteria; what they are compared with is not one of them."""
        return [
            name
            for name in self.criteria or criterion_names()
            if get_criterion(name).statistic != "loss_change"
        ]

    def check(self) -> torch.device:
        """See that the run can be done, without starting it; gives its device.

        Raises:
            Mistake: an option cannot be right; the message names it and what is.
        """
        if (self.model is None) != (self.data is None):
            given, missing = ("--model", "--data") if self.model else ("--data", "--model")
            raise Mistake(
                f"{given}: needs {missing} beside it, as in --model package.module:make_model "
                "--data package.module:make_loader"
            )
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
        check_seed(self.seed)
        device = find_device(self.device)
        check_writable(self.out)
        check_writable(self.cache)
        return device

    def command(self) -> str:
        """The command line that gives these settings, defaults left out."""
        plain = Settings()
        parts = ["taylor-kernels compare"]
        for name in ("model", "data", "loss", "sample", "batches", "budget", "seed", "device"):
            value = getattr(self, name)
            if value != getattr(plain, name):
                parts.append(f"--{name} {value:g}" if name == "budget" else f"--{name} {value}")
        parts += [f"--criteria {name}" for name in self.criteria or ()]
        parts += ["--quick"] if self.quick else []
        return " ".join([*parts, f"--out {self.out}"])
