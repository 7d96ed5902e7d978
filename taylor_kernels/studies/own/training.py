"""A user's model pruned while it trains, then fine-tuned; stopped, it goes on to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.course import Course
from taylor_kernels.studies.own.optimizer import users_optimizer
from taylor_kernels.studies.own.pace import Pace
from taylor_kernels.studies.own.processes import Processes, wrapped
from taylor_kernels.studies.own.scoring import checked_extra
from taylor_kernels.studies.own.settings import PruneSettings
from taylor_kernels.studies.own.stopping import Keeper
from taylor_kernels.studies.own.task import Task, as_mistakes
from taylor_kernels.studies.progress import Advance, ProgressLog

#: With --epochs there are at least so many prunings, if there are as many minibatches.
_PRUNINGS = 20
#: What a checkpoint keeps of how far a run is.
_COUNTERS = ("tuning", "minibatches", "pruned_at", "epoch", "done", "tuning_from")


class Training:
    """One run of `prune`: its model, optimizer and pruner, and how far it is.

    Args:
        team: the processes that train the model together; None where there is one.

    Attributes:
        model: pruned in place; compact once `tuning`.
        course: a point of the dense model, several on the way to the target, and one after every
            epoch of fine-tuning.
        tuning: the target is met.
        minibatches: seen so far; pruned_at: when the target was met.
    """

    def __init__(
        self,
        task: Task,
        settings: PruneSettings,
        log: ProgressLog,
        team: Processes | None = None,
    ) -> None:
        self.task, self.settings, self.log, self._team = task, settings, log, team
        self.model = self._trained = task.model
        self._loader = task.loader.of_process(team)
        self.optimizer = users_optimizer(self.model, settings)
        self._first_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.tuning = False
        self.minibatches = self.pruned_at = 0
        self.epoch = self.done = 0  # the epoch that is run, and its minibatches that are done
        self.tuning_from = 0
        self.course = Course(task, settings)
        self.every, self._pace_prunings = settings.every, 0
        if settings.epochs is not None:
            if self._loader.length() is None:
                log.say(
                    "counting the minibatches of --data, which does not say; --steps limits them"
                )
            minibatches = settings.epochs * self._loader.counted()
            self.every = max(1, min(settings.every, minibatches // _PRUNINGS))
            self._pace_prunings = max(1, minibatches // self.every)
        with as_mistakes():
            self.pruner = Pruner(
                self.model,
                task.example,
                settings.chosen,
                every=self.every,
                per_step=_count_or_fraction(settings.per_step),
                optimizer=self.optimizer,
                ranks=None if team is None else team.ranks,
                **settings.of_pruner,
            )
        self._pace = Pace(self.pruner, self._pace_prunings) if self._pace_prunings else None
        dtype, device = settings.amp_dtype(), next(self.model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        together = None if team is None else self._decided
        self._keeper = Keeper(
            settings.checkpoint, settings.save_every, self._save, log.say, together
        )

    def run(self) -> nn.Module:
        """Prune and fine-tune, from a checkpoint on if one is there and to be used.

        Raises:
            Mistake: the loss or a score is not finite, or the checkpoint is of another run.
            Stopped: the user asked for it; the checkpoint is there.
        """
        if self.settings.resume and self._is_there():
            self._load()
        self._wrap()
        with self._keeper.listening():
            if not self.course.points:
                self._add_point()
            if not self.tuning:
                self._prune()
            self._tune()
        return self.model

    def _prune(self) -> None:
        pruner = self.pruner
        with self.log.task("prune", 100) as advance:
            progress = _Progress(advance, pruner)
            progress.show("")
            while not pruner.done:
                for batch in self._epoch_from_here():
                    if self._pace is not None:
                        self._pace.set()
                    loss, record = self._step(batch, pruning=True)
                    progress.show(f"loss {loss:.3f}")
                    if pruner.done:
                        break
                    if record and self.course.is_due(pruner):
                        self._add_point()
                    self._keeper.between(f"while pruning, after minibatch {self.minibatches}")
                if not pruner.done:  # else it is saved as soon as it is compact
                    self._save()
        self.model = pruner.compact()
        self._wrap()  # what it averages are other parameters now
        self.tuning, self.pruned_at = True, self.minibatches
        self._add_point()
        self.epoch, self.done = self.epoch + 1, 0
        self.tuning_from = self.epoch
        self._save()

    def _tune(self) -> None:
        epochs = self.settings.finetune
        length = self._loader.length()
        with self.log.task("fine-tune", epochs * (length or 1)) as advance:
            passed = self.epoch - self.tuning_from
            advance(by=passed * (length or 1) + self.done)
            while (passed := self.epoch - self.tuning_from) < epochs:
                for batch in self._epoch_from_here():
                    part = (self.done - 1) / length if length else 0.0
                    self._set_rates((passed + part) / epochs)
                    loss, _ = self._step(batch, pruning=False)
                    advance(f"loss {loss:.3f}", by=1 if length else 0)
                    self._keeper.between(
                        f"while fine-tuning, after minibatch {self.done} of epoch "
                        f"{passed + 1} of {epochs}"
                    )
                advance(by=0 if length else 1)
                self._add_point()
                self._save()

    def _epoch_from_here(self) -> Iterator[Any]:
        """The minibatches of the present epoch that are not done; then it is the next one's turn.

        A minibatch counts as done as soon as it is handed out: what is saved is saved after it.
        """
        for number, batch in self._loader.epoch(self.epoch, self.done):
            self.done = number + 1
            yield batch
        self.epoch, self.done = self.epoch + 1, 0

    def _step(self, batch: Any, *, pruning: bool) -> tuple[float, object]:
        """Train on a minibatch, and prune if it is time."""
        self.model.train()
        where = f"on minibatch {self.minibatches} of the run,"

        def loss() -> Tensor:
            return self.task.judge(self.model, batch, where).loss

        self.optimizer.zero_grad(set_to_none=True)
        value = self.task.judge(self._trained, batch, where).loss
        number = value.item()
        if not math.isfinite(number):
            raise Mistake(f"--data: the loss is {number} {where} lower --lr, or look at the data")
        self._scaler.scale(value).backward()
        record = None
        if pruning:
            with as_mistakes():
                record = self._score(loss)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.minibatches += 1
        return number, record

    def _wrap(self) -> None:
        """Let the processes train one model, from now on; a collective."""
        if self._team is not None:
            self._trained = wrapped(self.model)

    def _decided(self, asked: bool, due: bool) -> tuple[bool, bool]:
        """One that is asked to stop stops all; the first one's clock says when to save."""
        assert self._team is not None
        everyone = self._team.heard(asked, due)
        return any(flag for flag, _ in everyone), everyone[0][1]

    def _score(self, loss: Callable[[], Tensor]) -> object:
        if self._scaler.is_enabled():
            grads = (p.grad for p in self.model.parameters() if p.grad is not None)
            if not all(grad.isfinite().all() for grad in grads):
                self.pruner.skip()
                return None
        closure = loss if self.pruner.needs_closure else None
        return self.pruner.step(loss_scale=self._scaler.get_scale(), closure=closure)

    def _set_rates(self, progress: float) -> None:
        """A cosine from the first learning rates to 0 over fine-tuning."""
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        for group, first in zip(self.optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = first * factor

    def _add_point(self) -> None:
        self.course.add(self.pruner, self.minibatches)

    def _save(self) -> None:
        save_checkpoint(
            self.settings.checkpoint,
            model=self.model,
            optimizer=self.optimizer,
            pruner=self.pruner,
            settings=self.settings.decisive(),
            scaler=self._scaler.state_dict(),
            course=self.course.points,
            **{name: getattr(self, name) for name in _COUNTERS},
        )

    def _is_there(self) -> bool:
        """Whether there is a checkpoint, which all processes have to see; a collective."""
        file = self.settings.checkpoint
        if self._team is None:
            return file.exists()
        seen = [flag for (flag,) in self._team.heard(file.exists())]
        if any(seen) and not all(seen):
            lacking = ", ".join(str(rank) for rank, flag in enumerate(seen) if not flag)
            raise Mistake(
                f"--resume: process {lacking} of {len(seen)} does not see {file}, which others do; "
                "give an --out that all of them read"
            )
        return all(seen)

    def _load(self) -> None:
        file = self.settings.checkpoint
        extra = checked_extra(self.settings)
        with as_mistakes():
            load_checkpoint(file, model=self.model, optimizer=self.optimizer, pruner=self.pruner)
        # Empty where the run was on a device with bfloat16, which is not scaled.
        if extra["scaler"]:
            self._scaler.load_state_dict(extra["scaler"])
        self.course.points = extra["course"]
        for name in _COUNTERS:
            setattr(self, name, extra[name])
        self.log.say(f"going on from {file}, after minibatch {self.minibatches}")


class _Progress:
    """How far a pruner is on the way to its targets, in percent."""

    def __init__(self, advance: Advance, pruner: Pruner) -> None:
        self._advance, self._pruner, self._shown = advance, pruner, 0.0

    def show(self, note: str) -> None:
        kept = self._pruner.cost.over(self._pruner.whole)
        parts = [
            (1 - kept[name]) / (1 - target) if target < 1 else 1.0
            for name, target in self._pruner.targets.items()
        ]
        passed = 100 * min(1.0, *parts)
        words = ", ".join(f"{name} {kept[name]:.0%}" for name in self._pruner.targets)
        self._advance(f"{words}  {note}", by=passed - self._shown)
        self._shown = passed


def _count_or_fraction(value: float) -> int | float:
    return value if value < 1 else int(value)
