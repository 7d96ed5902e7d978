"""What decides a run of `score` or `prune`, and the checks before any work starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taylor_kernels.criteria import Criterion
from taylor_kernels.statistics import Statistic, get_statistic
from taylor_kernels.studies.options import Mistake, check_writable, find_criteria
from taylor_kernels.studies.settings import StudySettings, flag

#: Options that say how a run goes and not what comes out.
_HOW = frozenset({"out", "device", "force", "resume", "save_every", "dry_run"})


@dataclass(frozen=True)
class OwnSettings(StudySettings):
    """A job on a model of the user's.

    Attributes:
        model, data, loss, forward: import paths, "package.module:name".
        criterion: a name.
        batches: how many minibatches the scores are of.
        amp: compute in a half type where that is safe.
        resume: go on from the checkpoint in `out`.
        save_every: seconds between two checkpoints.
    """

    model: str = ""
    data: str = ""
    loss: str | None = None
    forward: str | None = None
    criterion: str = "taylor_fo_bn"
    batches: int = 20
    amp: bool = False
    resume: bool = False
    save_every: float = 60.0

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def chosen(self) -> Criterion:
        return find_criteria([self.criterion], option="--criterion")[0]

    @property
    def statistic(self) -> type[Statistic]:
        return get_statistic(self.chosen.statistic)

    def amp_dtype(self) -> torch.dtype | None:
        """bfloat16 where the device computes in it, else float16, whose losses are scaled."""
        if not self.amp:
            return None
        device = self.torch_device()
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return torch.float16
        return torch.bfloat16

    def check(self) -> None:
        super().check()
        find_criteria([self.criterion], option="--criterion")
        if self.loss is not None and self.forward is not None:
            raise Mistake(
                "--forward: computes the loss itself, so --loss beside it would not be used; give "
                "one of them"
            )
        if self.batches < 1:
            raise Mistake(f"--batches: {self.batches} is below 1")
        if not self.save_every >= 0:
            raise Mistake(f"--save-every: {self.save_every:g} is not a number of seconds")

    def check_folder(self) -> None:
        """See that the folder can be written, and that no unfinished run is lost in it.

        Raises:
            Mistake: it cannot, or one would be.
        """
        check_writable(self.out)
        if self.checkpoint.exists() and not self.resume and not self.force:
            raise Mistake(
                f"--out: {self.checkpoint} is of a run that is not finished; go on with --resume, "
                "or start anew with --force"
            )

    def decisive(self) -> str:
        """The options that decide the result, as JSON: a checkpoint is of the same ones."""
        return json.dumps({k: v for k, v in self.plain().items() if k not in _HOW})

    def differing(self, other: str) -> list[str]:
        """The options in which a run with the `decisive` options `other` was another."""
        theirs, own = json.loads(other), json.loads(self.decisive())
        return [flag(k) for k in own.keys() | theirs.keys() if own.get(k) != theirs.get(k)]

    @property
    def name(self) -> str:
        """Of the command."""
        return "score"


@dataclass(frozen=True)
class ScoreSettings(OwnSettings):
    """A run of `score`."""

    out: Path = Path("runs/score")


@dataclass(frozen=True)
class PruneSettings(OwnSettings):
    """A run of `prune`.

    Attributes:
        val: import path of a loader to judge on; None for the first minibatches of `data`.
        flops, params, filters: the fractions to keep.
        epochs: spread the pruning over so many; None for as many as `per_step` takes.
        finetune: epochs after it.
        every, per_step, round_to, min_filters, ignore, blocks: as of `tk.Pruner`.
        lr: learning rate; None for the optimizer's own.
        optimizer: import path; None for momentum SGD.
        steps: at most so many minibatches are an epoch.
        dry_run: say what would go, and write nothing.
    """

    out: Path = Path("runs/prune")
    val: str | None = None
    flops: float | None = None
    params: float | None = None
    filters: float | None = None
    epochs: int | None = None
    finetune: int = 1
    every: int = 10
    per_step: float = 0.02
    round_to: int = 1
    min_filters: int = 1
    ignore: tuple[str, ...] = ()
    blocks: bool = False
    lr: float | None = None
    optimizer: str | None = None
    steps: int | None = None
    dry_run: bool = False

    @property
    def name(self) -> str:
        return "prune"

    @property
    def of_pruner(self) -> dict[str, Any]:
        """What every Pruner of these settings is made with."""
        return {
            "flops": self.flops,
            "params": self.params,
            "filters": self.filters,
            "round_to": self.round_to,
            "min_filters": self.min_filters,
            "ignore": self.ignore,
            "blocks": self.blocks,
        }

    @property
    def targets(self) -> dict[str, float]:
        """The fractions to keep that were given."""
        values = {"flops": self.flops, "params": self.params, "filters": self.filters}
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        super().check()
        if not self.statistic.prunable:
            raise Mistake(
                f"--criterion: {self.criterion!r} says nothing of filters that go together; prune "
                "with taylor_fo_bn or taylor_fo_gate"
            )
        self._check_targets()
        for name, least in (("epochs", 1), ("finetune", 0), ("every", 1), ("steps", 1),
                            ("round_to", 1), ("min_filters", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise Mistake(f"{flag(name)}: {value} is below {least}")
        if not (0 < self.per_step < 1 or (self.per_step >= 1 and self.per_step % 1 == 0)):
            raise Mistake(
                f"--per-step: {self.per_step:g} is neither a fraction of the filters, such as "
                "0.02, nor a whole number of them"
            )
        if self.epochs is not None and self.per_step != PruneSettings.per_step:
            raise Mistake(
                "--epochs: decides how many filters go at a time, and so does --per-step; give one "
                "of them"
            )
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise Mistake(f"--lr: {self.lr:g} is not a positive number")
        if self.dry_run and self.resume:
            raise Mistake("--dry-run: changes nothing, so there is nothing to --resume")

    def _check_targets(self) -> None:
        if not self.targets:
            raise Mistake(
                "--flops, --params, --filters: none is given; say what fraction to keep, such as "
                "--flops 0.5"
            )
        for name, value in self.targets.items():
            if not 0 < value <= 1:
                hint = f"; for {value:g}% write {value / 100:g}" if 1 < value < 100 else ""
                raise Mistake(
                    f"--{name}: {value:g} is not between 0 and 1; 0.5 keeps half of it{hint}"
                )
        if all(value == 1 for value in self.targets.values()):
            kept = ", ".join(f"--{name} 1" for name in self.targets)
            raise Mistake(f"{kept}: keeps everything, so nothing is to go; 0.5 keeps half")
        if self.targets.get("filters") == 1:
            others = ", ".join(f"--{n} {v:g}" for n, v in self.targets.items() if n != "filters")
            raise Mistake(
                f"--filters 1: keeps every filter, which contradicts {others}; leave one of them "
                "out"
            )
