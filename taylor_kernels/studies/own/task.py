"""A user's model, data and loss, found by import path and tried on a minibatch before any work."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.statistics.layers import eval_mode
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.judge import TARGETS, Judge, right_answers
from taylor_kernels.studies.own.parts import Minibatches, seed_everything, users_model
from taylor_kernels.studies.own.paths import describe
from taylor_kernels.studies.own.settings import OwnSettings
from taylor_kernels.tracing.run.running import call, example_count, quiet, tensors_in


@dataclass(frozen=True)
class Task:
    """What a job works on.

    Attributes:
        model: on the device.
        loader: what it is scored and trained on.
        judge: gives a minibatch's loss.
        inputs: what the model is called with on the first minibatch.
        example: the same of one example, where the model takes one alone.
        classifies: answers can be counted.
    """

    model: nn.Module
    loader: Minibatches
    judge: Judge
    inputs: Any
    example: Any
    classifies: bool

    @property
    def per_example(self) -> bool:
        """Whether `example` is one example and not a whole minibatch."""
        return self.example is not self.inputs


def users_task(settings: OwnSettings, device: torch.device, *, limit: int | None = None) -> Task:
    """The task of these settings; the model is in eval mode and as it was made.

    Args:
        limit: of the minibatches of an epoch.

    Raises:
        Mistake: an import path leads nowhere, or to what cannot be used.
    """
    seed_everything(settings.seed)
    model = users_model(settings.model).to(device).eval()
    model.zero_grad(set_to_none=True)  # what the user's code left is of no minibatch of this run
    loader = Minibatches("--data", settings.data, seed=settings.seed, limit=limit, device=device)
    judge = Judge(settings.loss, settings.forward, settings.amp_dtype())
    batch = loader.first()
    outcome = judge.checked(model, batch)
    inputs = _seen_inputs(model, judge, batch)
    return Task(
        model,
        loader,
        judge,
        inputs,
        _one_example(model, inputs),
        right_answers(outcome) is not None,
    )


def figures(judge: Judge, model: nn.Module, batches: Iterable[tuple[int, Any]]) -> dict[str, float]:
    """Mean loss in eval mode over numbered minibatches, and the fraction of right answers."""
    total = examples = hits = answers = 0.0
    with eval_mode(model), torch.no_grad():
        for number, batch in batches:
            outcome = judge(model, batch, f"on minibatch {number} of those to judge on,")
            n = example_count(batch if outcome.targets is None else outcome.targets)
            total += n * float(outcome.loss)
            examples += n
            if right := right_answers(outcome):
                hits, answers = hits + right[0], answers + right[1]
    found = {"loss": total / examples}
    return found | {"accuracy": hits / answers} if answers else found


def _seen_inputs(model: nn.Module, judge: Judge, batch: Any) -> Any:
    """What the model is called with on a minibatch: a tensor, a tuple or a dict of arguments."""
    seen: list[tuple[tuple, dict]] = []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with quiet(model.modules()):
            judge(model, batch)
    finally:
        handle.remove()
    if not seen:
        raise Mistake(
            "--forward: it never called the model itself (a method of it, or a part, does not "
            "show what the model takes); call model(...)"
        )
    args, kwargs = seen[0]
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    if args:
        kwargs = _by_name(model, args, kwargs)
    fewer = {name: value for name, value in kwargs.items() if name not in TARGETS}
    return fewer if len(fewer) < len(kwargs) and _runs(model, fewer) else kwargs


def _by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments that are given partly by place, all by name."""
    signature = inspect.signature(model.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise Mistake(
                f"--forward: it calls the model with *{name} and with arguments by name, which "
                "cannot both be traced; pass all by name"
            )
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def _one_example(model: nn.Module, inputs: Any) -> Any:
    """The inputs cut to one example, or as they are where the model does not run on one."""
    first = next(tensors_in(inputs), None)
    if first is None or first.dim() == 0 or first.size(0) < 2:
        return inputs
    cut = first_examples(inputs, 1)
    return cut if _runs(model, cut) else inputs


def first_examples(inputs: Any, number: int) -> Any:
    """So many examples: all tensors that are as long as the first one are cut."""
    length = next(tensors_in(inputs)).size(0)
    return tree_map(
        lambda value: (
            value[:number]
            if isinstance(value, Tensor) and value.dim() and value.size(0) == length
            else value
        ),
        dict(inputs) if isinstance(inputs, Mapping) else inputs,
    )


def _runs(model: nn.Module, inputs: Any) -> bool:
    with quiet(model.modules()), eval_mode(model):
        try:
            call(model, inputs)
        except Exception:
            return False
    return True


@contextmanager
def as_mistakes() -> Iterator[None]:
    """What the package says of a user's arguments or gradients becomes one line.

    Its messages begin with the argument, which is an option of the command.
    """
    try:
        yield
    except Mistake:
        raise
    except (ValueError, RuntimeError, TimeoutError, MemoryError) as error:
        argument, colon, rest = str(error).partition(":")
        options = ", ".join(f"--{name.strip().replace('_', '-')}" for name in argument.split(","))
        known = colon and all(part.strip().isidentifier() for part in argument.split(","))
        known = known and "example_inputs" not in argument
        message = f"{options}:{rest}" if known else f"--model: {describe(error)}"
        raise Mistake(message) from error
