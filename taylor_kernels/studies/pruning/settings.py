"""What decides a run of the demo, and the checks that are made before any work starts."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import taylor_kernels as tk
from taylor_kernels.options import check_seed, check_writable, find_criteria, find_device
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.pruning.data import IMAGE_SHAPE
from taylor_kernels.studies.pruning.model import DigitsResNet

DEFAULT_CRITERIA = ("taylor_fo_bn", "magnitude_l2", "random")


@dataclass(frozen=True)
class Recipe:
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


FULL = Recipe()
QUICK = Recipe(dense_epochs=8, every=4, per_step=0.04, finetune_epochs=3, latency_repeats=15)


@dataclass(frozen=True)
class Settings:
    """A run of the demo as the user asked for it.

    Attributes:
        out: the folder to write to.
        seed: the first seed; a seed decides the split, the dense network and its pruning.
        seeds: how many seeds are run: `seed`, `seed` + 1, ...
        flops: the fraction of FLOPs to keep, in (0, 1).
        device: cpu, cuda, cuda:N, or auto: a GPU where PyTorch sees one.
        force: train the dense networks again although they are cached.
    """

    out: Path = Path("runs/demo")
    seed: int = 0
    seeds: int = 3
    flops: float = 0.5
    criteria: tuple[str, ...] = DEFAULT_CRITERIA
    device: str = "auto"
    force: bool = False
    recipe: Recipe = FULL

    def check(self) -> None:
        """See that the run can be done, without starting it.

        Raises:
            ValueError: an option cannot be right; the message names it and what is.
        """
        if not (math.isfinite(self.flops) and 0 < self.flops < 1):
            raise ValueError(
                f"--flops: {self.flops:g} is not between 0 and 1; 0.5 keeps half of the FLOPs"
            )
        if self.seeds < 1:
            raise ValueError(f"--seeds: {self.seeds} is below 1")
        check_seed(self.seed)
        for criterion in find_criteria(self.criteria):
            if not get_statistic(criterion.statistic).prunable:
                raise ValueError(
                    f"--criteria: {criterion.name!r} needs a pass over the data per filter, which "
                    "the demo's loop does not do; choose another"
                )
        self.torch_device()
        _check_reachable(self)
        check_writable(self.out)

    def torch_device(self) -> torch.device:
        """The device of the run.

        Raises:
            ValueError: it is no device's name, or PyTorch does not see it.
        """
        return find_device(self.device)

    def dense_key(self, seed: int) -> str:
        """A name for the dense network of a seed, made of all that decides its weights."""
        recipe = asdict(self.recipe)
        decides = (
            "width", "blocks", "batch_size", "weight_decay", "dense_epochs", "dense_lr", "threads",
        )  # fmt: skip
        parts = [seed, self.torch_device().type, torch.__version__]
        parts += [recipe[name] for name in decides]
        here = Path(__file__).parent
        parts += [(here / f"{name}.py").read_text() for name in ("data", "model", "training")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_reachable(settings: Settings) -> None:
    recipe = settings.recipe
    model, image = DigitsResNet(recipe.width, recipe.blocks), torch.zeros(1, *IMAGE_SHAPE)
    try:
        tk.Pruner(model, image, settings.criteria[0], flops=settings.flops, verify=False).close()
    except ValueError as error:
        raise ValueError(f"--{error}") from None
