"""Values of a run: which operation made each from which others, and which module gave it to whom.

Labels say which channels go together; values say where a tensor came from. A value is known by the
memory that it lies in and by which part of it: views of the same part are the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from taylor_kernels.tracing.notes.memories import Memories
from taylor_kernels.tracing.notes.operations import memory_of

#: Where in a module's output a tensor is: () for the output itself, (number, length) in a sequence.
Path = tuple[int, int] | tuple[()]
_Key = TypeVar("_Key")
_Layout = tuple[int, tuple[tuple[int, int], ...]]


@dataclass(slots=True)
class Value:
    """What one operation made, or what came from outside of the run (`operation` is "").

    Attributes:
        parents: the values that it was made of, tensors in the order of the arguments.
        numel: how many elements it has.
        step: the number of the operation among those of the run, from 0.
        view: it is a part of its parent, or the same elements.
    """

    operation: str
    parents: tuple[int, ...]
    numel: int
    step: int
    view: bool = False


class Passed(NamedTuple):
    """A tensor that a module was given, or that it returned."""

    value: int
    shape: tuple[int, ...]


@dataclass
class ModuleCall:
    """One run of a module.

    Attributes:
        module: its name.
        first, stop: the values that were made meanwhile: first <= number < stop.
        given: position or keyword -> the tensor that it was given.
        plain: it was given one tensor, and nothing else.
        returned: where in its output -> the tensor there.
    """

    module: str
    first: int
    stop: int
    given: dict[int | str, Passed]
    plain: bool
    returned: dict[Path, Passed] = field(default_factory=dict)


class Values:
    """Follows the values of a run.

    Args:
        memories: the run's.

    Attributes:
        values: all, in running order.
        calls: of modules, in the order in which they ended.
        outputs: the values that the model returned.
    """

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self.values: list[Value] = []
        self.calls: list[ModuleCall] = []
        self.outputs: set[int] = set()
        self._known: dict[int, dict[_Layout, int]] = {}
        self._open: list[tuple[nn.Module, ModuleCall]] = []

    # Modules

    def enter(self, module: nn.Module, name: str, args: Sequence[Any]) -> None:
        """A module begins to run on these arguments."""
        given: dict[int | str, Passed] = dict(self._passed(enumerate(args)))
        plain = len(args) == len(given) == 1
        number = len(self.values)
        self._open.append((module, ModuleCall(name, number, number, given, plain)))

    def leave(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        """It has returned, and with it those inside that an error has stopped."""
        while self._open:
            known, call = self._open.pop()
            if known is module:
                break
        else:
            return
        call.given |= dict(self._passed(kwargs.items()))
        call.plain = call.plain and not kwargs
        parts: list[tuple[Path, Any]] = [((), output)]
        if type(output) in (tuple, list):
            parts = [((number, len(output)), part) for number, part in enumerate(output)]
        call.returned = dict(self._passed(parts))
        call.stop = len(self.values)
        self.calls.append(call)

    def _passed(self, values: Iterable[tuple[_Key, Any]]) -> Iterator[tuple[_Key, Passed]]:
        for key, value in values:
            if isinstance(value, Tensor):
                yield key, Passed(self.of(value), tuple(value.shape))

    def returns(self, tensor: Tensor) -> None:
        """The model has returned a tensor."""
        self.outputs.add(self.of(tensor))

    # Operations

    def of(self, tensor: Tensor) -> int:
        """The number of a tensor's value."""
        memory, layout = _place(tensor)
        known = self._known.setdefault(memory, {})
        if layout not in known:
            # Other elements of memory that is known, or something from outside.
            parents = tuple(dict.fromkeys(known.values()))
            operation = "view" if parents else ""
            known[layout] = self._new(operation, parents, tensor, 0, view=bool(parents))
        return known[layout]

    def follow(
        self, name: str, given: Sequence[Tensor], outs: Iterable[Tensor],
        written: Sequence[Tensor], parents: Sequence[int], step: int,
    ) -> None:  # fmt: skip
        """An operation has run.

        Args:
            given: its tensors; `parents` are their values as they were before.
            written: those of them that it has written into.
        """
        for tensor in written:
            memory, layout = _place(tensor)
            # What else there was in this memory is read through what was written.
            before = self._known.get(memory, {}).values()
            number = self._new(name, dict.fromkeys((*parents, *before)), tensor, step)
            self._known[memory] = {layout: number}
        memories = {memory_of(tensor) for tensor in given}
        made = -1
        for tensor in outs:
            memory, layout = _place(tensor)
            if memory in memories:
                known = self._known.setdefault(memory, {})
                if layout not in known:
                    known[layout] = self._new(name, parents, tensor, step, view=True)
                continue
            if made < 0:
                made = self._new(name, parents, tensor, step)
            else:  # another result of the operation: its memory is known by this value too
                self._memories.hold(tensor)
            self._known[memory] = {layout: made}

    def _new(
        self, operation: str, parents: Iterable[int], tensor: Tensor, step: int, view: bool = False
    ) -> int:
        self._memories.hold(tensor)
        self.values.append(Value(operation, tuple(parents), tensor.numel(), step, view))
        return len(self.values) - 1


def _place(tensor: Tensor) -> tuple[int, _Layout]:
    """The memory of a tensor, and which elements of it the tensor has, in whatever order:
    dimensions that can be merged are, and the others are sorted."""
    memory = memory_of(tensor)
    if memory < 0:
        return memory, (0, ())
    offset = int(tensor.storage_offset())
    if tensor.is_contiguous():
        numel = tensor.numel()
        return memory, (offset, ((1, numel),) if numel != 1 else ())
    dims = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size != 1
    )
    merged: list[tuple[int, int]] = []
    for stride, size in dims:
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return memory, (offset, tuple(merged))
