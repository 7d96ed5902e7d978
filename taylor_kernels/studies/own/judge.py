"""What a minibatch of a user's data is to their model: the loss, and how many answers are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.paths import find_function, naming
from taylor_kernels.tracing.run.running import call

#: Under these names a minibatch that is a dict has its targets.
TARGETS = ("labels", "label", "targets", "target")
_FIRST = "on the first minibatch,"


@dataclass(frozen=True)
class Outcome:
    """What came of a minibatch; `outputs` and `targets` are None where --forward alone knows."""

    loss: Tensor
    outputs: Any = None
    targets: Any = None


class Judge:
    """Runs a model on a minibatch.

    A pair is (inputs, targets): model(inputs) is called and then the loss; of a dict the model gets
    all entries by name and returns its loss, or, with --loss, all but the targets. Anything else is
    left to --forward, which gets the model and the minibatch.

    Args:
        loss, forward: import paths, or None.
        amp: the type that autocast is to use, or None for none.

    Raises:
        Mistake: a path leads nowhere.
    """

    def __init__(
        self, loss: str | None, forward: str | None, amp: torch.dtype | None = None
    ) -> None:
        self._forward_path, self._amp = forward, amp
        self._loss = None if loss is None else find_function("--loss", loss)
        self._forward = None if forward is None else find_function("--forward", forward)

    def __call__(self, model: nn.Module, batch: Any, where: str = _FIRST) -> Outcome:
        """The loss of a minibatch, and what it was computed from.

        Raises:
            Mistake: the minibatch is of another kind, or the user's code raises.
        """
        device = next(model.parameters()).device.type
        cast: AbstractContextManager[object] = nullcontext()
        if self._amp is not None:
            cast = torch.autocast(device, self._amp)
        with cast:
            if self._forward is not None:
                with naming(f"--forward: {self._forward_path}(model, batch), {where}"):
                    return Outcome(self._forward(model, batch))
            if isinstance(batch, Mapping):
                return self._of_mapping(model, batch, where)
            if isinstance(batch, (tuple, list)) and len(batch) == 2:
                inputs, targets = batch
                return self._with(self._loss or F.cross_entropy, model, inputs, targets, where)
        many = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise Mistake(
            f"--data: a minibatch is a {type(batch).__name__}{many}, neither a pair (inputs, "
            "targets) nor a dict; give --forward package.module:function, which turns the model "
            "and a minibatch into a loss"
        )

    def checked(self, model: nn.Module, batch: Any) -> Outcome:
        """The outcome of the first minibatch, whose loss is one.

        Raises:
            Mistake: it is no finite scalar that depends on the model.
        """
        outcome = self(model, batch)
        option, loss = self._source(batch), outcome.loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            gave = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise Mistake(f"{option}: it gave {gave}; return a scalar tensor, a mean over examples")
        if not loss.isfinite():
            raise Mistake(f"{option}: it is {loss.item()} on the first minibatch")
        if not loss.requires_grad:
            raise Mistake(f"{option}: it does not depend on the model's parameters; do not detach")
        return outcome

    def _source(self, batch: Any) -> str:
        if self._forward is not None:
            return "--forward"
        return "--model" if isinstance(batch, Mapping) and self._loss is None else "--loss"

    def _of_mapping(self, model: nn.Module, batch: Mapping[str, Any], where: str) -> Outcome:
        key = next((name for name in TARGETS if name in batch), None)
        if self._loss is not None:
            if key is None:
                raise Mistake(
                    f"--data: a minibatch is a dict without targets for --loss; name them one of "
                    f"{', '.join(TARGETS)}, or give --forward (it has {_names(batch)})"
                )
            inputs = {name: value for name, value in batch.items() if name != key}
            return self._with(self._loss, model, inputs, batch[key], where)
        with naming(
            f"--model: the model, given {_names(batch)} by name (give --forward for another way), "
            f"{where}"
        ):
            outputs = model(**batch)
        loss = _entry(outputs, "loss")
        if loss is None:
            has = _names(outputs) if isinstance(outputs, Mapping) else "no names"
            raise Mistake(
                f"--model: of a dict with {_names(batch)} it returned a {type(outputs).__name__} "
                f"without a loss ({has}); give --loss, or labels in the minibatch"
            )
        return Outcome(loss, outputs, batch.get(key) if key else None)

    def _with(
        self, loss: Callable[..., Any], model: nn.Module, inputs: Any, targets: Any, where: str
    ) -> Outcome:
        with naming(f"--model: the model, {where}"):
            outputs = call(model, inputs)
        hint = "" if self._loss else " (cross_entropy; give another one with --loss "
        hint += "" if self._loss else "package.module:name)"
        with naming(f"--loss: the loss{hint}, {where}"):
            return Outcome(loss(outputs, targets), outputs, targets)


def _names(batch: Mapping[str, Any]) -> str:
    return ", ".join(map(str, batch)) or "nothing"


def _entry(outputs: Any, name: str) -> Any:
    """What a mapping or an object with attributes has under a name, or None."""
    found = outputs.get(name) if isinstance(outputs, Mapping) else None
    return getattr(outputs, name, None) if found is None else found


def right_answers(outcome: Outcome) -> tuple[int, int] | None:
    """(right answers, answers) of a classifier's outcome; None where it is none."""
    outputs, targets = outcome.outputs, outcome.targets
    outputs = outputs if isinstance(outputs, Tensor) else _entry(outputs, "logits")
    if not is_classifier(outputs, targets):
        return None
    return int((outputs.argmax(1) == targets).sum()), targets.numel()


def is_classifier(outputs: Any, targets: Any) -> bool:
    """Whether outputs are logits [N, C, ...] and targets the classes [N, ...]."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.dim() >= 2
        and not targets.is_floating_point()
        and targets.shape == outputs.shape[:1] + outputs.shape[2:]
    )
