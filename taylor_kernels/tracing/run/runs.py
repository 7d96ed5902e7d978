"""All runs of one trace: without values where none are needed, in train mode where it differs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taylor_kernels.tracing.model.caches import keeping, renew
from taylor_kernels.tracing.multihead import prunable_attention
from taylor_kernels.tracing.notes.experts import one_expert_at_a_time
from taylor_kernels.tracing.run.checked_widths import keep_whole
from taylor_kernels.tracing.run.hollow import can_be_hollow, is_worth_it
from taylor_kernels.tracing.run.one_run import run_once
from taylor_kernels.tracing.run.recorder import Execute, Recorder
from taylor_kernels.tracing.run.refusals import refusal
from taylor_kernels.tracing.run.returned import (
    Read,
    UnknownOutput,
    reach_the_output,
    returned_tensors,
)
from taylor_kernels.tracing.run.running import new_garbage_only, quiet, tensors_in
from taylor_kernels.tracing.run.shared_memory import Shared, find_shared, go_together
from taylor_kernels.tracing.run.training import learn_from_training, set_training
from taylor_kernels.tracing.run.untouched import Untouched


class Count(Protocol):
    """Runs the operations of a run, and writes down what it wants of them."""

    def restart(self) -> None:
        """A run begins; there may have been another one, which did not come to its end."""

    def run(self, func: Any, args: tuple, kwargs: Mapping, made: Any) -> Any:
        """Run an operation, unless this is `made`, which it would return."""


class Runs:
    """The runs of a model that a trace reads, each under a recorder of its own.

    Args:
        model, example_inputs, blocks: as of `tk.trace`.
        modules: dict(model.named_modules()).
        tensors: parameters and buffers by their first names.
        seconds: for all runs together.
        count: runs the operations; None where the recorder does.
        read: what others read of the outputs, as `outputs` of `tk.trace`.
        shared: what shares memory in the model that this one is a copy of.

    Attributes:
        names: of the modules.
        untouched: what the model was before.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        *,
        seconds: float,
        count: Count | None,
        blocks: bool,
        read: Read,
        shared: Shared | None,
    ) -> None:
        self.names = {module: name for name, module in modules.items()}
        self.untouched = Untouched(list(self.names), list(tensors.values()))
        self._model, self._example_inputs = model, example_inputs
        self._modules, self._tensors = modules, tensors
        self._until = time.monotonic() + seconds
        self._count, self._blocks, self._read, self._shared = count, blocks, read, shared
        self._recorders: list[Recorder] = []
        self._ones: frozenset[tuple[str, int]] = frozenset()

    def recorded(self, ones: frozenset[tuple[str, int]]) -> Recorder:
        """The recorder that has seen all that the model does; the model is as it was.

        Args:
            ones: (tensor, dimension) of what is masked with ones, as far as that is known before.
        """
        self._ones = ones
        try:
            with new_garbage_only(), quiet(self.names):
                recorder = self._seen()
                # What is masked with ones is known at the end, and was taken for zero until then.
                while not recorder.record.divisors <= self._ones:
                    self._ones |= recorder.record.divisors
                    self.untouched.restore()
                    recorder = self._seen()
        finally:
            for each in self._recorders:
                each.memories.release()
            self.untouched.restore()
        return recorder

    def _seen(self) -> Recorder:
        """The recorder of the runs that it takes to see all that the model does."""
        recorder = None
        given = list(tensors_in(self._example_inputs))
        if is_worth_it(self._tensors.values(), given) and can_be_hollow(self.names):
            recorder = self._attempt(hollow=True)
            if recorder is None or _kept_hollow(recorder):
                self.untouched.restore()  # what code has kept in attributes is let go
                if recorder is not None and _kept_hollow(recorder):
                    recorder = None  # what it has kept elsewhere, as in a table, gets values
        recorder = recorder or self._attempt(hollow=False)
        assert recorder is not None
        self.untouched.restore()  # the tensors that have atoms are in their places again
        learn_from_training(recorder, self._modules, self._train, self._new_recorder)
        return recorder

    def _attempt(self, hollow: bool) -> Recorder | None:
        """Trace one run; None where it was to leave work out, and could not."""
        execute = None
        if self._count is not None:
            self._count.restart()
            execute = self._count.run
        recorder = self._new_recorder(execute, blocks=self._blocks, hollow=hollow)
        with prunable_attention(self.names), one_expert_at_a_time(self.names):
            for name, tensor in self._tensors.items():
                recorder.add(name, tensor)
            shared = self._shared or find_shared(self._modules, self._tensors)
            go_together(recorder, self._tensors, shared)
            kept = keeping(self.names)
            with torch._C._AutoDispatchBelowAutograd() if kept else nullcontext(), recorder:
                if any(module.training for module in self.names):
                    self._model.eval()  # which takes its time, as every module sets an attribute
                renew(kept)
            keep_whole(recorder, self.names)
            try:
                outputs = list(self._run(recorder))
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

    def _train(self, recorder: Recorder) -> list[Tensor]:
        """Run the model in train mode, from the state that the caller has left it in."""
        self.untouched.restore()
        try:
            with prunable_attention(self.names), one_expert_at_a_time(self.names):
                with torch._C._AutoDispatchBelowAutograd(), recorder:
                    set_training(self._model)
                return list(self._run(recorder))
        finally:
            self.untouched.restore()

    def _run(self, recorder: Recorder) -> Iterator[Tensor]:
        outputs = run_once(recorder, self._model, self.names, self._example_inputs)
        return returned_tensors(self._model, self._example_inputs, outputs, self._read)

    def _new_recorder(self, execute: Execute | None = None, **options: bool) -> Recorder:
        left = max(self._until - time.monotonic(), 0.0)
        recorder = Recorder(self.names, self.untouched.touch, left, execute, **options)
        recorder.record.ones = self._ones
        self._recorders.append(recorder)
        return recorder


def _kept_hollow(recorder: Recorder) -> bool:
    """Whether something without values is still held by code."""
    return recorder.hollow is not None and recorder.hollow.kept
