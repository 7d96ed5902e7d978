"""Scores of every filter of a user's model, over minibatches of their data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from taylor_kernels.files import write_atomically
from taylor_kernels.importance import Importance
from taylor_kernels.pruning import save_checkpoint
from taylor_kernels.pruning.saving.checkpoint import read_checkpoint
from taylor_kernels.statistics import Reads
from taylor_kernels.statistics.activation_gradients import scoring
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.settings import OwnSettings
from taylor_kernels.studies.own.stopping import Keeper
from taylor_kernels.studies.own.task import Task, as_mistakes
from taylor_kernels.studies.progress import ProgressLog

#: What a loss in float16 is multiplied by at first, as PyTorch's GradScaler has it.
_GREATEST_SCALE = 2.0**16


@dataclass(frozen=True)
class Scores:
    """What was found.

    Attributes:
        values, errors: layer -> [F] float32, and the standard error of each; nan where there is
            none.
        minibatches: how many they are of.
        notes: what the meter warned of.
    """

    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    minibatches: int
    notes: list[str]

    def save(self, file: Path, about: Mapping[str, str]) -> None:
        """Write `<layer>` and `<layer>.standard_error` as safetensors, whole or not at all."""
        content = {name or "model": values.cpu() for name, values in self.values.items()}
        content |= {
            f"{name or 'model'}.standard_error": values.cpu()
            for name, values in self.errors.items()
        }
        metadata = {"taylor_kernels.scores": json.dumps(dict(about))}
        data = save({name: t.contiguous() for name, t in content.items()}, metadata)
        write_atomically(file, lambda part: part.write(data))


def scored(task: Task, settings: OwnSettings, log: ProgressLog, *, keep: bool) -> Scores:
    """Score the model in eval mode, frozen layers too, and leave it as it was.

    Args:
        keep: write checkpoints, and go on from one that is there.

    Raises:
        Mistake: the criterion has nothing to read here.
        Stopped: the user asked for it; the checkpoint is there.
    """
    model, flags = task.model, [(p, p.requires_grad) for p in task.model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(parameter.is_floating_point())
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings(record=True) as caught, as_mistakes():
            warnings.simplefilter("always", UserWarning)
            meter = Importance(model, settings.chosen, example_inputs=task.example)
            try:
                _fill(meter, task, settings, log, keep=keep)
                values, errors = meter.compute(), meter.standard_error()
            finally:
                meter.close()
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    notes = dict.fromkeys(str(w.message) for w in caught if "taylor_kernels" in w.filename)
    for note in notes:
        log.say(note)
    return Scores(values, errors, meter.state_dict()["updates"], list(notes))


def _fill(
    meter: Importance, task: Task, settings: OwnSettings, log: ProgressLog, *, keep: bool
) -> None:
    done = 0
    nothing = nn.Identity()  # the model does not change, so it is in no checkpoint

    def save_it() -> None:
        save_checkpoint(
            settings.checkpoint,
            model=nothing,
            meter=meter.state_dict(),
            settings=settings.decisive(),
        )

    if keep and settings.resume and settings.checkpoint.exists():
        extra = checked_extra(settings)
        meter.load_state_dict(extra["meter"])
        done = extra["meter"]["updates"]
        log.say(f"going on from {settings.checkpoint}, after minibatch {done}")
    keeper = Keeper(settings.checkpoint, settings.save_every, save_it, log.say)
    reads = settings.statistic.reads
    length, total = task.loader.length(), 1 if reads == "weights" else settings.batches
    total = total if length is None else min(total, length)
    with keeper.listening() if keep else nullcontext(), log.task("score", total) as advance:
        advance(by=done)
        for number, batch in task.loader.epoch(0, done):
            if number >= total:
                break
            half = settings.amp_dtype() is torch.float16
            _update(meter, task, reads, batch, f"on minibatch {number},", half=half)
            advance()
            if keep and number + 1 < total:
                keeper.between(f"after minibatch {number + 1} of {total}")


def checked_extra(settings: OwnSettings) -> dict[str, Any]:
    """The extras of the checkpoint of a run with the same options.

    Raises:
        Mistake: it is damaged, or of another run.
    """
    file = settings.checkpoint
    try:
        extra = read_checkpoint(file)["extra"]
    except ValueError as error:
        raise Mistake(f"--resume: {str(error).removeprefix('path: ')}") from error
    theirs = extra.get("settings")
    if not isinstance(theirs, str):
        raise Mistake(f"--resume: {file} was not written by this command")
    if differing := settings.differing(theirs):
        raise Mistake(
            f"--resume: {file} is of a run with another {', '.join(sorted(differing))}; give the "
            "same, or start anew with --force"
        )
    return extra


def _update(
    meter: Importance, task: Task, reads: Reads, batch: Any, where: str, *, half: bool
) -> None:
    """One minibatch: as far as the criterion needs the passes, then update()."""
    model = task.model

    def loss() -> Tensor:
        return task.judge(model, batch, where).loss

    if reads == "closure":
        meter.update(closure=loss)
        return
    scale = 1.0
    if reads == "forward":
        with torch.no_grad():
            loss()
    elif reads != "weights":
        mode: AbstractContextManager[object] = nullcontext()
        if reads == "activations" and not half:  # gradients of weights show what overflows
            mode = scoring(model)

        def finite() -> Tensor:
            value = loss()
            if not value.isfinite():
                raise Mistake(f"--data: the loss is {value.item()} {where.rstrip(',')}")
            return value

        with mode:
            scale = run_backward(model, finite, meter.skip, half=half)
    meter.update(loss_scale=scale)
    model.zero_grad(set_to_none=True)


def run_backward(
    model: nn.Module, loss: Callable[[], Tensor], skip: Callable[[], None], *, half: bool
) -> float:
    """backward() of the loss, multiplied in float16, where most small gradients would become 0.

    The multiple begins anew with every minibatch, so that a score does not depend on those before.

    Args:
        skip: makes whoever reads the gradients forget those that overflowed.
        half: the model computes in float16.

    Returns:
        What the loss was multiplied by.
    """
    scale = _GREATEST_SCALE if half else 1.0
    while True:
        (loss() * scale).backward()
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        if scale <= 1 or all(grad.isfinite().all() for grad in grads):
            return scale
        skip()
        model.zero_grad(set_to_none=True)
        scale /= 2
