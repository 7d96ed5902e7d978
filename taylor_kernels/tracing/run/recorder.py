"""The dispatch mode that runs every operation as it is and hands its labels to a rule."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.tracing.notes.across import AcrossNorms
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Echo
from taylor_kernels.tracing.notes.experts import is_router
from taylor_kernels.tracing.notes.labels import Labels, Store
from taylor_kernels.tracing.notes.memories import Memories
from taylor_kernels.tracing.notes.operations import OperationMode, operation, tensors_of
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.notes.values import Values
from taylor_kernels.tracing.run.applying import apply
from taylor_kernels.tracing.run.calls import MAKERS, MOVES, PASSES, REPEATS, RULES, Call
from taylor_kernels.tracing.run.chance import Draws, tell
from taylor_kernels.tracing.run.flow import Flow
from taylor_kernels.tracing.run.frames import Frame
from taylor_kernels.tracing.run.hollow import Hollow


def _any_followed(operands: Iterable[Labels]) -> bool:
    """Whether there are atoms to follow, or there may be once something is written."""
    for labels in operands:
        if labels.name or labels.uniform or labels.memory.repeated:
            return True
        for vector in labels.dims:
            if vector is not None:
                return True
    return False


#: Of every tensor in a run that is not followed.
_UNSEEN = Labels.fixed(())
#: Runs an operation with its arguments and keyword arguments, unless its result is given.
Execute = Callable[[Any, tuple, Mapping, Any], Any]


def _execute(func: Any, args: tuple, kwargs: Mapping, made: Any) -> Any:
    return func(*args, **kwargs) if made is None else made


class Recorder(OperationMode):
    """Runs operations and writes down what they do with labels.

    Attributes:
        record: what was written down.
        frame: the module that runs, or the code outside of all.
        memories: those that values are known by.
        flow: the norms and products that channels go through.
        across: finds the modules that normalise across channels.
        touched: called with a tensor before something is written into it.
        hollow: which tensors have no values; None in a run of the model as it is.
        kinds: how many operations of each name have run, and what modules have returned.
        draws: told when the run goes into a module or leaves one.
        blind: as given.

    Args:
        execute: runs an operation; for callers that count what runs.
        blocks: also follow where tensors come from, by which residual blocks are found.
        hollow: layers need not compute what they return.
        blind: operations are counted and not followed.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        touched: Callable[[Tensor], None],
        seconds: float,
        execute: Execute | None = None,
        blocks: bool = False,
        hollow: bool = False,
        blind: bool = False,
    ) -> None:
        super().__init__()
        self.blind = blind
        self.kinds: Counter[str] = Counter()
        self._execute = execute or _execute
        self.memories = Memories()
        self.hollow = Hollow(self.memories) if hollow else None
        self.record = Record(values=Values(self.memories) if blocks else None)
        self.store = Store()
        self.flow = Flow(self)
        self.across = AcrossNorms(self)
        self.frame = Frame()
        self._outer: list[Frame] = []  # those around it
        self.returned: dict[str, Any] = {}  # by routers
        self.touched = touched
        self.draws: Draws | None = None
        self.composite = ""  # the operation that PyTorch makes of others just now
        self._names = names
        self._until, self._seconds = time.monotonic() + seconds, seconds

    # What module runs

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.draws is not None:
            self.draws.enter(module)
        name, record = self._names.get(module, ""), self.record
        if self.blind:
            self._outer.append(self.frame)
            self.frame = Frame(module, name)
            return
        first = len(record.fixed)
        if record.values is not None:
            record.values.enter(module, name, args)
        given = [value for value in args if isinstance(value, Tensor)]
        met = [self.known(tensor) for tensor in given]
        self.frame.leaf = False
        self.frame.met += met  # what code hands on it has at hand, however it was given it
        self._outer.append(self.frame)
        mixed = len(given) != len(args)
        self.frame = Frame(module, name, [] if mixed else given, first, met, mixed=mixed)
        record.ran.add(name)

    def leave(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        if is_router(module):
            self.returned[self._names.get(module, "")] = output
        if self.record.values is not None:
            self.record.values.leave(module, kwargs, output)
        if self.draws is not None and self._outer:
            self.draws.leave(module, self._outer[-1].name, output)
        while self._outer:
            frame, self.frame = self.frame, self._outer.pop()
            if frame.module is module:
                self._count(f"{type(output).__name__} of {frame.name}")
                if self.blind:
                    break
                if frame.norms:
                    self.record.norm_calls.append((frame.name, frame.norms))
                tell(self.record, frame.name, self.module, output)
                self.flow.leave(frame, output)
                self.across.leave(frame, kwargs, output)
                break

    def _count(self, kind: str) -> None:
        # += asks a Counter's own code for what is not there yet.
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, operations are the trace's own: the caller, who may count, does not run them."""
        before, self._execute = self._execute, _execute
        try:
            yield
        finally:
            self._execute = before

    @property
    def module(self) -> str:
        return self.frame.name

    def name_of(self, module: nn.Module) -> str | None:
        return self._names.get(module)

    # Labels

    def known(self, tensor: Tensor) -> Labels:
        """The labels of a tensor of which no value is read, as yet."""
        if self.blind:
            return _UNSEEN
        found = self.store.get(tensor)
        if found is None or len(found.shape) != tensor.dim():
            found = Labels.fixed(tensor.shape)
            self.store.set(tensor, found)
        return found

    def labels(self, tensor: Tensor) -> Labels:
        found = self.known(tensor)
        if found.kept_if_read:
            for vector, reason in found.kept_if_read:
                self.record.fix(vector, reason)
            found.kept_if_read = ()
        return found

    def add(self, name: str, tensor: Tensor) -> None:
        """Give a parameter or buffer its atoms."""
        if tensor not in self.store:
            vectors = self.record.tensor(name, tensor.shape)
            zero = self.record.zeros(name, tensor.dim())
            labels = Labels(tuple(tensor.shape), list(vectors), zero, name=name)
            if not all(zero):
                self.record.fills[name] = {dim: 1.0 for dim in range(tensor.dim()) if not zero[dim]}
            self.store.set(tensor, labels)

    def origin(self, vector: Vector | None) -> tuple[str, int]:
        """The parameter or buffer that the first of these atoms belongs to, and its dimension."""
        first = 0 if vector is None or not vector.size else int(vector[(vector != 0).argmax()])
        place = bisect_right(self.record.starts, first, key=lambda s: s[0]) if first else 0
        if not place:
            return "", 0
        start, name, dim, size = self.record.starts[place - 1]
        return (name, dim) if first < start + size else ("", 0)

    def owner(self, name: str) -> str:
        """The module to which a use of this parameter belongs: the running one if it holds it."""
        if self.frame.module is not None:
            for tensor in self.frame.module._parameters.values():
                labels = None if tensor is None else self.store.get(tensor)
                if labels is not None and labels.name == name:
                    return self.frame.name
        owner = name.rpartition(".")[0]
        return "" if owner.startswith("parametrizations.") else owner.split(".parametrizations.")[0]

    def echo(self, vector: Vector, where: tuple[str, str], doubt: int = 0) -> None:
        """The running module's code has given these the size that they have, as a number."""
        found = self.frame.as_wide(vector, first=True)
        if found:
            self.record.echoes.append(Echo(vector.copy(), tuple(found), where, doubt))

    # Operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        # A mode for functions would be asked at every attribute of a tensor below.
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple, kwargs: Mapping) -> Any:
        if time.monotonic() > self._until:
            raise TimeoutError(
                f"model: tracing it takes more than {self._seconds:g} seconds; pass a smaller "
                "example (fewer entries, steps or pixels), or a greater seconds="
            )
        known = operation(func)
        if known.composite and known.name not in RULES:
            around, self.composite = self.composite, self.composite or known.name
            try:
                with self:
                    out = func.decompose(*args, **kwargs)
            finally:
                self.composite = around
            if out is not NotImplemented:
                return out
        if self.blind and self.hollow is None and not (known.written or known.statistics):
            self._count(known.name)
            return self._execute(func, args, kwargs, None)
        call = Call(self, func, known, args, kwargs)
        self.frame.met += call.labels.values()
        record = self.record
        written: list[Tensor] = []
        names = known.written
        if known.statistics and call.args.get("training", call.args.get("use_input_stats", True)):
            names += known.statistics
        for name in names:
            written += tensors_of(call.args.get(name))
        for tensor in written:
            self.touched(tensor)
        values = record.values
        parents = [] if values is None else [values.of(tensor) for tensor in call.tensors]
        made, kind = (None, None) if self.hollow is None else self.hollow.before(call)
        call.out = self._execute(func, args, kwargs, made)
        self._count(call.name)
        call.outs = tensors_of(call.out)
        call.lies = [self.memories.hold(out) for out in call.outs]
        if self.hollow is not None and kind is not None:
            self.hollow.after(kind, call, written)
        if self.blind:
            return call.out
        if values is not None:
            values.follow(call.name, call.tensors, call.outs, written, parents, record.step)
        record.step += 1
        name = call.name
        if call.asks:
            record.asked.add(self.module)
            if call.operation.counts:
                record.counted.add(self.module)
        if (
            _any_followed(call.labels.values())
            or not call.tensors
            or name in MAKERS
            or name in REPEATS
        ):
            apply(self, call, written)
        else:
            self.flow.forget(call)
        if name in PASSES:
            for labels in call.labels.values():
                for out in call.outs if labels.kept_if_read else ():
                    self.known(out).kept_if_read = labels.kept_if_read
        if name not in MOVES:
            for labels in call.labels.values():
                for vector in labels.dims:
                    # vector.any() is slow for vectors this short: mostly the first place tells.
                    if vector is not None and vector.size:
                        first = vector.item(0)
                        if first or vector.any():
                            record.seen.add(first)
        return call.out
