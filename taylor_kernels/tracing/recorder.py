"""The dispatch mode that runs every operation as it is and hands its labels to a rule."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taylor_kernels.tracing.across import AcrossNorms
from taylor_kernels.tracing.experts import is_router
from taylor_kernels.tracing.flow import Flow
from taylor_kernels.tracing.labels import Labels, Store, has_atoms
from taylor_kernels.tracing.operations import Operation, operation, tensors_of
from taylor_kernels.tracing.record import Echo, Reason, Record, Size, Vector
from taylor_kernels.tracing.values import Values


class Call:
    """One operation that has run.

    Attributes:
        name: the operation's, without namespace, overload and the underscore of in-place forms.
        args: its arguments by name, defaults included.
        out: its result, as PyTorch returned it.
        labels: of each tensor among the arguments, by id, as they were before.
    """

    def __init__(
        self, recorder: Recorder, func: Any, known: Operation, args: tuple, kwargs: Mapping
    ) -> None:
        self.recorder = recorder
        self.record = recorder.record
        self.func = func
        self.operation = known
        self.name = known.name
        self.args: dict[str, Any] = dict(known.defaults)
        self.args.update(zip(known.arguments, args, strict=False))
        self.args.update(kwargs)
        self.out: Any = None
        self.labels: dict[int, Labels] = {}
        self.tensors: list[Tensor] = []
        self._collect(args)
        if kwargs:
            self._collect(kwargs.values())

    def _collect(self, values: Iterable) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) not in self.labels:
                    self.tensors.append(value)
                    self.labels[id(value)] = self.recorder.labels(value)
            elif isinstance(value, (list, tuple)):
                self._collect(value)

    def of(self, tensor: Tensor) -> Labels:
        return self.labels[id(tensor)]

    def arg(self, *names: str) -> Any:
        """The first of these arguments that the operation has."""
        return next((self.args[name] for name in names if name in self.args), None)

    def atoms(self, labels: Labels, dim: int) -> Vector | None:
        """The atoms of a dimension; of zeros that code made (the first state of a recurrence), new
        ones: they are as wide as what they are used with."""
        if not labels.is_uniform or not labels.is_zero(dim) or labels.shape[dim] < 2:
            return labels.dims[dim]
        fresh = self.record.fresh(labels.shape[dim])
        for place, module, attribute in labels.counted:
            if place == dim % len(labels.shape):
                self.record.sizes.append(Size(module, attribute, fresh, True))
        return fresh

    @property
    def where(self) -> tuple[str, str]:
        return self.recorder.module, self.name

    @property
    def running(self) -> nn.Module | None:
        """The module that runs."""
        return self.recorder.stack[-1][1] if self.recorder.stack else None

    def reason(self, text: str, *, mixer: bool = False) -> Reason:
        """A reason that names where this happens."""
        return self.record.reason(text, self.where, mixer=mixer)

    def join(self, one: Vector | None, other: Vector | None) -> None:
        if one is not other:
            self.record.join(one, other, self.where)

    def mix(self, vector: Vector | None) -> None:
        """The operation mixes these atoms."""
        if vector is not None:
            self.record.fix(vector, self.reason(MIXED, mixer=True))

    def refuse_all(self, text: str) -> None:
        """No atom of any operand can go."""
        for labels in self.labels.values():
            for vector in labels.vectors():
                self.refuse(vector, text)

    def refuse(self, vector: Vector | None, text: str) -> None:
        if vector is not None:
            self.record.fix(vector, self.reason(text))


Rule = Callable[[Call], Any]
#: Why channels that an operation mixes stay.
MIXED = "is mixed with other channels"
RULES: dict[str, Rule] = {}
#: The name of the rule for operations that have none.
OTHER = "*"


#: Operations that make tensors of their own although they are given one.
MAKERS = {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
#: Operations that repeat places, also of tensors without atoms.
REPEATS = {"expand", "repeat"}
#: Operations that leave every value as it is, and only say where it lies.
MOVES = {
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "transpose",
    "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "unsqueeze", "squeeze",
    "contiguous", "clone", "alias", "detach",
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for operations of these names.

    A rule returns the labels of its results in the order of the tensors in them: one `Labels`, or
    a list; None, or an entry that is None, for a tensor that no atom has made.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def followed(labels: Labels) -> bool:
    """Whether there are atoms to follow, or there may be once something is written."""
    if labels.name or labels.uniform or labels.memory.repeated:
        return True
    for vector in labels.dims:  # noqa: SIM110 - a generator for each operand costs more than this
        if vector is not None:
            return True
    return False


Execute = Callable[[Any, tuple, Mapping], Any]


def _execute(func: Any, args: tuple, kwargs: Mapping) -> Any:
    return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Runs operations and writes down what they do with labels.

    Attributes:
        record: what was written down.
        flow: the norms and products that channels go through.
        across: finds the modules that normalise across channels.
        touched: called with a tensor before something is written into it.

    Args:
        execute: runs an operation; for callers that count what runs.
        blocks: also follow where tensors come from, by which residual blocks are found.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        touched: Callable[[Tensor], None],
        seconds: float,
        execute: Execute | None = None,
        blocks: bool = False,
    ) -> None:
        super().__init__()
        self._execute = execute or _execute
        self.record = Record(values=Values() if blocks else None)
        self.store = Store()
        self.flow = Flow(self)
        self.across = AcrossNorms(self)
        self.stack: list[tuple[str, nn.Module]] = []
        self.returned: dict[str, Any] = {}  # by routers
        self._met: list[list[Labels]] = [[]]  # by each running module, the code outside at first
        self.touched = touched
        self._names = names
        self._until, self._seconds = time.monotonic() + seconds, seconds

    # What module runs

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._names.get(module, "")
        self.flow.enter(module, args)
        self.across.enter(module, args)
        if self.record.values is not None:
            self.record.values.enter(module, name, args)
        self.stack.append((name, module))
        self._met.append([self.labels(value) for value in args if isinstance(value, Tensor)])
        self.record.ran.add(name)

    def leave(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        if is_router(module):
            self.returned[self._names.get(module, "")] = output
        self.flow.leave(module, output)
        self.across.leave(module, self._names.get(module, ""), kwargs, output)
        if self.record.values is not None:
            self.record.values.leave(module, kwargs, output)
        while self.stack:
            self._met.pop()
            if self.stack.pop()[1] is module:
                break

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
        return self.stack[-1][0] if self.stack else ""

    # Labels

    def labels(self, tensor: Tensor) -> Labels:
        found = self.store.get(tensor)
        if found is None or len(found.shape) != tensor.dim():
            found = Labels.fixed(tensor.shape)
            self.store.set(tensor, found)
        for vector, reason in found.kept_if_read:
            self.record.fix(vector, reason)
        found.kept_if_read = ()
        return found

    def add(self, name: str, tensor: Tensor) -> None:
        """Give a parameter or buffer its atoms."""
        if self.store.get(tensor) is None:
            vectors = self.record.tensor(name, tensor.shape)
            labels = Labels(tuple(tensor.shape), list(vectors), [True] * tensor.dim(), name=name)
            self.store.set(tensor, labels)

    def origin(self, vector: Vector | None) -> str:
        """The name of the parameter or buffer that the first of these atoms belongs to."""
        first = 0 if vector is None or not vector.size else int(vector[(vector != 0).argmax()])
        place = bisect_right(self.record.starts, first, key=lambda s: s[0]) if first else 0
        if not place:
            return ""
        start, name, _, size = self.record.starts[place - 1]
        return name if first < start + size else ""

    def owner(self, name: str) -> str:
        """The module to which a use of this parameter belongs: the running one if it holds it."""
        if self.stack:
            running, module = self.stack[-1]
            for tensor in module._parameters.values():
                labels = None if tensor is None else self.store.get(tensor)
                if labels is not None and labels.name == name:
                    return running
        owner = name.rpartition(".")[0]
        return "" if owner.startswith("parametrizations.") else owner.split(".parametrizations.")[0]

    def echo(self, vector: Vector, where: tuple[str, str], doubt: int = 0) -> None:
        """The running module's code has given these the size that they have, as a number."""
        found = self.as_wide(vector, first=True)
        if found:
            self.record.echoes.append(Echo(vector.copy(), tuple(found), where, doubt))

    def as_wide(self, vector: Vector, *, first: bool = False) -> list[Vector]:
        """Other vectors of this size, of tensors that the running module's code has met.

        Args:
            first: none where this one itself was met before all of them.
        """
        found: list[Vector] = []
        for labels in self._met[-1]:
            for other in labels.dims:
                if other is None or other.size != vector.size:
                    continue
                if first and not found and np.array_equal(other, vector):
                    return []
                if other is not vector and not any(
                    np.array_equal(other, one) for one in (vector, *found)
                ):
                    found.append(other.copy())
        return found

    # Operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # False: PyTorch need not wrap each call so that no compiler looks into it.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if time.monotonic() > self._until:
            raise TimeoutError(
                f"model: tracing it takes more than {self._seconds:g} seconds; pass a smaller "
                "example (fewer entries, steps or pixels), or a greater seconds="
            )
        known = operation(func)
        if known.composite and known.name not in RULES:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        call = Call(self, func, known, args, kwargs)
        self._met[-1] += call.labels.values()
        written: list[Tensor] = []
        for name in known.written:
            written += tensors_of(call.args.get(name))
        for tensor in written:
            self.touched(tensor)
        values = self.record.values
        parents = [] if values is None else [values.of(tensor) for tensor in call.tensors]
        call.out = self._execute(func, args, kwargs)
        if values is not None:
            outs = tensors_of(call.out)
            values.follow(call.name, call.tensors, outs, written, parents, self.record.step)
        self.record.step += 1
        makes = not call.tensors or call.name in MAKERS or call.name in REPEATS
        if makes or any(map(followed, call.labels.values())):
            self._apply(call, written)
        else:
            self.flow.forget(call)
        if call.name not in MOVES:
            seen = self.record.seen
            for labels in call.labels.values():
                for vector in labels.dims:
                    if vector is not None and has_atoms(vector):
                        seen.add(vector.item(0))
        return call.out

    def _apply(self, call: Call, written: list[Tensor]) -> None:
        outs = tensors_of(call.out)
        products, norms = len(self.record.products), len(self.record.norms)
        try:
            result = RULES.get(call.name, RULES[OTHER])(call)
        except MemoryError:
            raise
        except Exception as error:
            # Arguments that the rule does not foresee: what it cannot follow cannot go.
            self.record.failures.append(f"{call.name} in {self.module!r}: {error!r}")
            call.refuse_all("goes through an operation that is not known in this form")
            result = None
        labels = result if isinstance(result, list) else [result]
        labels += [None] * (len(outs) - len(labels))
        for tensor, new in zip(outs, labels, strict=False):
            new = new or Labels.fixed(tensor.shape)
            if written and any(tensor is other for other in written) and not call.operation.moves:
                self._write(call, tensor, new)
            else:
                new.shape = tuple(tensor.shape)
                self.store.set(tensor, new)
        if not outs and written:
            for tensor, new in zip(written, labels, strict=False):
                self._write(call, tensor, new or Labels.fixed(tensor.shape))
        found = self.record.products[products:], self.record.norms[norms:]
        self.flow.follow(call, outs or written, *found)

    def _write(self, call: Call, tensor: Tensor, new: Labels) -> None:
        """Labels of values that were written into a tensor, seen by all its views."""
        old = call.labels.get(id(tensor))
        if old is None or old.shape != tuple(tensor.shape):
            new.shape = tuple(tensor.shape)
            self.store.set(tensor, new)
            return
        if old.uniform or old.memory.repeated:
            part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
            other = (old.uniform and not new.is_uniform) or not old.loose <= new.repeated
            old.memory.uneven |= part or other
        for dim, vector in enumerate(new.dims):
            mine = old.dims[dim]
            if vector is mine:
                pass
            elif mine is not None and old.uniform:
                if vector is not None:
                    blank = mine == 0
                    call.join(mine[~blank], vector[~blank])
                    mine[blank] = vector[blank]
            else:
                call.join(mine, vector)
        old.uniform = old.uniform and new.uniform
        if not all(
            new.is_zero(dim) or vector is None or not vector.any()
            for dim, vector in enumerate(old.dims)
        ):
            old.memory.spoiled = True
