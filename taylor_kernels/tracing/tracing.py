"""`trace`: run a model once with labels riding along."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taylor_kernels.checks import check_number
from taylor_kernels.tracing import rules  # noqa: F401 - importing registers them
from taylor_kernels.tracing.answer.channels import Channels
from taylor_kernels.tracing.model.caches import keeping, modules_by_name, renew
from taylor_kernels.tracing.multihead import prunable_attention
from taylor_kernels.tracing.notes.experts import find_mixtures, one_expert_at_a_time
from taylor_kernels.tracing.rules.norms import running_variances
from taylor_kernels.tracing.run.checked_widths import keep_whole
from taylor_kernels.tracing.run.hollow import can_be_hollow, is_worth_it
from taylor_kernels.tracing.run.one_run import run_once
from taylor_kernels.tracing.run.recorder import Execute, Recorder
from taylor_kernels.tracing.run.refusals import refusal
from taylor_kernels.tracing.run.replaced import follow_replaced
from taylor_kernels.tracing.run.returned import (
    Read,
    UnknownOutput,
    checked_outputs,
    reach_the_output,
    returned_tensors,
)
from taylor_kernels.tracing.run.running import (
    is_lazy,
    new_garbage_only,
    one_at_a_time,
    quiet,
    tensors_in,
    tensors_of_modules,
)
from taylor_kernels.tracing.run.shared_memory import Shared, find_shared, go_together
from taylor_kernels.tracing.run.training import learn_from_training, set_training
from taylor_kernels.tracing.run.untouched import Untouched


class Count(Protocol):
    """Runs the operations of a run, and writes down what it wants of them."""

    def restart(self) -> None:
        """A run begins; there may have been another one, which did not come to its end."""

    def run(self, func: Any, args: tuple, kwargs: Mapping, made: Any) -> Any:
        """Run an operation, unless this is `made`, which it would return."""


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 300.0,
    blocks: bool = False,
    outputs: Read = None,
) -> Channels:
    """Which index of which dimension of which parameter goes with which.

    The model is run once in eval mode on the example inputs, below autograd and module code, so
    functions, methods, custom modules and any container of outputs are read alike. It is afterwards
    as it was: modes, buffers, attributes, hooks, random state, also after an error. Where that run
    has not read some parameter or buffer, or train mode does more, further runs in train mode say
    which channels go together there; what these do not read either, though chance might lead a
    run to it or the model does not train on the inputs, keeps the channels of its width.

    Of a large model without hooks on its modules, convolutions, linear layers and norms are not
    computed, nor most of what is done to what they return: what a trace says follows from shapes.
    As soon as code reads values (in a condition, as an index, in numpy), that run ends, and the
    model is run as it is.

    Args:
        model: any module; parameters may be on any device, in any floating-point type.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments. They
            are run as they are, since only the caller knows what may be cut: one item is enough.
        seconds: tracing stops with an error after this time.
        blocks: also follow where tensors come from, so that `Channels.find_blocks` can be asked.
        outputs: names of fields, or places, of what the model returns that others read, and that
            keeps its width therefore. None for all, but for state that the model itself takes back.

    Returns:
        The groups of channels that go together, and for all others why they cannot go.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has no parameters, has lazy or meta ones, or does not run on the
            example inputs, or nothing is in these, or it returns none of such `outputs`.
        TimeoutError: it takes longer than `seconds`; or other threads have traced, one after
            another, for ten minutes.
        MemoryError: labels need more than 2 GiB.

    Example:
        >>> import torch
        >>> from taylor_kernels.tracing import trace
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> channels = trace(model, torch.randn(1, 4))
        >>> channels.groups[0].size, channels.skipped
        (8, {'2': 'reaches the output of the model'})
    """
    return traced(model, example_inputs, seconds, blocks=blocks, outputs=outputs)


def traced(
    model: nn.Module,
    example_inputs: Any,
    seconds: float = 300.0,
    count: Count | None = None,
    *,
    blocks: bool = False,
    outputs: Read = None,
    shared: Shared | None = None,
) -> Channels:
    """`trace` for callers that run the operations themselves. One runs at a time in a process:
    a trace exchanges methods of tensors and classes of modules, and puts back what it found.

    Args:
        count: runs the operations.
        shared: what shares memory in the model that this one is a copy of.
    """
    with one_at_a_time():
        return _traced(model, example_inputs, seconds, count, blocks, outputs, shared)


def _traced(
    model: nn.Module,
    example_inputs: Any,
    seconds: float,
    count: Count | None,
    blocks: bool,
    read: Read,
    shared: Shared | None,
) -> Channels:
    check_number("seconds", seconds, lambda most: most > 0, "a number above 0")
    modules = _modules(model)
    tensors = _checked(modules)
    if read is not None:
        checked_outputs(read)
    given = list(tensors_in(example_inputs))
    if given and not any(tensor.numel() for tensor in given):
        raise ValueError(
            f"example_inputs: nothing is in them (shape {tuple(given[0].shape)}), so "
            "sizes cannot be told apart; pass at least one example"
        )
    names = {module: name for name, module in modules.items()}
    untouched = Untouched(list(names), [tensor for _, tensor in tensors])
    by_name, until = dict(tensors), time.monotonic() + seconds
    recorders: list[Recorder] = []

    def new_recorder(execute: Execute | None = None, **options: bool) -> Recorder:
        left = max(until - time.monotonic(), 0.0)
        recorders.append(Recorder(names, untouched.touch, left, execute, **options))
        recorders[-1].record.ones = ones
        return recorders[-1]

    def run(recorder: Recorder) -> Iterator[Tensor]:
        outputs = run_once(recorder, model, names, example_inputs)
        if not recorder.blind:
            follow_replaced(recorder, names, by_name)
        return returned_tensors(model, example_inputs, outputs, read)

    def attempt(hollow: bool) -> Recorder | None:
        """Trace one run; None where it was to leave work out, and could not."""
        if count is not None:
            count.restart()
        recorder = new_recorder(None if count is None else count.run, blocks=blocks, hollow=hollow)
        with prunable_attention(names), one_expert_at_a_time(names):
            for name, tensor in tensors:
                recorder.add(name, tensor)
            go_together(recorder, by_name, shared or find_shared(modules, by_name))
            kept = keeping(names)
            with torch._C._AutoDispatchBelowAutograd() if kept else nullcontext(), recorder:
                if any(module.training for module in names):
                    model.eval()  # which takes its time, as every module sets an attribute
                renew(kept)
            keep_whole(recorder, names)
            try:
                outputs = list(run(recorder))
            except (TimeoutError, MemoryError, UnknownOutput):
                raise
            except Exception as error:
                if hollow:
                    return None
                raise ValueError(refusal(error, recorder.module)) from error
            if recorder.hollow is not None and recorder.hollow.asked:
                return None
            reach_the_output(recorder, outputs)
        return recorder

    def kept_hollow(recorder: Recorder) -> bool:
        return recorder.hollow is not None and recorder.hollow.kept

    def train(recorder: Recorder) -> list[Tensor]:
        """Run the model in train mode, from the state that the caller has left it in."""
        untouched.restore()
        try:
            with prunable_attention(names), one_expert_at_a_time(names):
                with torch._C._AutoDispatchBelowAutograd(), recorder:
                    set_training(model)
                return list(run(recorder))
        finally:
            untouched.restore()

    def recorded() -> Recorder:
        """The record of the runs that it takes to see all that the model does."""
        recorder = None
        if is_worth_it((tensor for _, tensor in tensors), given) and can_be_hollow(names):
            recorder = attempt(hollow=True)
            if recorder is None or kept_hollow(recorder):
                untouched.restore()
                if recorder is not None and kept_hollow(recorder):
                    recorder = None  # what code has kept elsewhere, as in a table, gets values
        recorder = recorder or attempt(hollow=False)
        assert recorder is not None
        untouched.restore()  # the tensors that have atoms are in their places again
        learn_from_training(recorder, modules, train, new_recorder)
        return recorder

    ones = running_variances(modules)
    try:
        with new_garbage_only(), quiet(names):
            recorder = recorded()
            # What is masked with ones is known by the end only, and was taken for zero until then.
            while not recorder.record.divisors <= ones:
                ones |= recorder.record.divisors
                untouched.restore()
                recorder = recorded()
    finally:
        for each in recorders:
            each.memories.release()
        untouched.restore()
    recorder.record.mixtures += find_mixtures(recorder.record, modules, recorder.returned)
    recorder.record.written = [n for n, tensor in tensors if untouched.was_written(tensor)]
    with prunable_attention(names):
        return Channels(recorder.record, modules)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return modules_by_name(model)


def _checked(modules: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a model that can be traced."""
    parameters, buffers = tensors_of_modules(modules)
    tensors = [*parameters.items(), *buffers.items()]
    if not tensors:
        raise ValueError("model: it has no parameters, so there are no channels to follow")
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise ValueError(
                f"model: its parameter {name!r} is lazy; run the model once on the example inputs"
            )
        if tensor.is_meta:
            raise ValueError(
                f"model: its parameter {name!r} is on the meta device; load the model's values "
                "first (model.to_empty(device=...), then load_state_dict)"
            )
    return tensors
