"""One operation that has run, and the rules that say what it does with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taylor_kernels.tracing.model.code import only_asserts_now, own_module
from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.entries import Size
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.operations import Operation, memory_of

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.recorder import Recorder


class Call:
    """One operation that has run.

    Attributes:
        name: the operation's, without namespace, overload and the underscore of in-place forms.
        args: its arguments by name, defaults included.
        out: its result, as PyTorch returned it.
        outs: the tensors in that, and `lies` the memory that each lies in.
        tensors: those among the arguments, each once, and `memories` what these lie in.
        labels: of each of them, by id, as they were before.
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
        self.outs: list[Tensor] = []
        self.lies: list[int] = []
        self.labels: dict[int, Labels] = {}
        self.tensors: list[Tensor] = []
        self.memories: list[int] = []
        self._collect(args)
        if kwargs:
            self._collect(kwargs.values())

    def _collect(self, values: Iterable) -> None:
        known = self.labels
        look = self.recorder.known if self.name in PASSES else self.recorder.labels
        for value in values:
            if isinstance(value, Tensor):
                key = id(value)
                if key not in known:
                    self.tensors.append(value)
                    self.memories.append(memory_of(value))
                    known[key] = look(value)
            elif isinstance(value, (list, tuple)):
                self._collect(value)

    def of(self, tensor: Tensor) -> Labels:
        return self.labels[id(tensor)]

    def arg(self, *names: str) -> Any:
        """The first of these arguments that the operation has."""
        return next((self.args[name] for name in names if name in self.args), None)

    @property
    def asks(self) -> bool:
        """Whether it tells the code that runs of values, which may go another way by them. An index
        of numbers does not: its result is as long as they are. Nor does an assertion that holds."""
        indices = self.args.get("indices", ()) if self.name == "index" else None
        return (
            self.operation.asks
            and (
                indices is None
                or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
            )
            and not (self.name in READERS and only_asserts_now())
        )

    def again(self, values: Mapping[str, Any]) -> Any:
        """What the operation makes of other arguments; those by position have to be among them."""
        known = self.operation
        return self.func(
            *(values[name] for name in known.arguments if name not in known.keywords),
            **{name: values[name] for name in known.keywords if name in values},
        )

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
        return self.recorder.frame.module

    @cached_property
    def holder(self) -> tuple[nn.Module | None, str]:
        """The module whose attributes the code that runs has at hand as its own, and its name: the
        one that runs, or another of which that one's code has called a method."""
        module = own_module()
        name = None if module is None else self.recorder.name_of(module)
        return (self.running, self.recorder.module) if name is None else (module, name)

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
#: Operations that have a rule and make Python numbers of values.
READERS = {"_local_scalar_dense", "item", "equal"}
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
#: Of those, and of those that repeat, the ones whose results say what is to be said of their
#: operand once anything else is made of them.
PASSES = {"unsqueeze", "expand", "detach", "alias", "transpose", "permute"}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for operations of these names.

    A rule returns the labels of its results in the order of the tensors in them: one `Labels`, or
    a list; None, or an entry that is None, for a tensor that no atom has made.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register
