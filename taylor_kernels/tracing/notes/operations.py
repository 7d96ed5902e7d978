"""What is to be known about PyTorch's operations, looked up once for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Recurrent layers, all steps and stacked layers in one operation.
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@dataclass(frozen=True)
class Operation:
    """What is to be known about an overload.

    Attributes:
        name: without namespace, overload and the underscore of in-place forms.
        arguments: their names; `keywords` are those that are passed by keyword.
        written: the arguments that it writes into.
        statistics: those that a norm writes into in training, of which its schema says nothing.
        composite: it is made of other operations.
        pointwise: PyTorch says that it works element by element.
        moves: it makes its argument a view of other sizes, in place.
        asks: PyTorch says that its result, or the shape of it, tells Python of values.
        counts: the shape does, which whoever is handed the result can see.
    """

    name: str
    arguments: tuple[str, ...]
    keywords: tuple[str, ...]
    defaults: Mapping[str, Any]
    written: tuple[str, ...]
    statistics: tuple[str, ...]
    composite: bool
    pointwise: bool
    moves: bool
    asks: bool
    counts: bool


@cache
def operation(func: Any) -> Operation:
    """What the schema and the tags of an operation (an OpOverload) say of it."""
    name = func._schema.name.rpartition("::")[2]
    if name.endswith("_") and not name.endswith("__"):
        name = name.rstrip("_")
    arguments = func._schema.arguments
    written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    learns = "norm" in name and not name.endswith(("no_training", "no_update", "functional"))
    statistics = {"running_mean", "running_var"}.intersection(a.name for a in arguments)
    # where(condition) is nonzero(), without its tag.
    counts = torch.Tag.dynamic_output_shape in func.tags or (
        name == "where" and len(arguments) == 1
    )
    return Operation(
        name,
        tuple(a.name for a in arguments),
        tuple(a.name for a in arguments if a.kwarg_only),
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        written,
        tuple(sorted(statistics.difference(written))) if learns else (),
        torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        ),
        torch.Tag.pointwise in func.tags,
        torch.Tag.inplace_view in func.tags,
        counts or torch.Tag.data_dependent_output in func.tags,
        counts,
    )


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an operation's result."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def memory_of(tensor: Tensor) -> int:
    """What all views of a tensor have in common, as long as one of them is alive.

    Negative for tensors without memory of their own to know them by: sparse ones, and those inside
    vmap. PyTorch refuses those sooner than it says what they are.
    """
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return -id(tensor)


def address_of(tensor: Tensor) -> int:
    """Where in memory a tensor begins; 0 if it has none of its own, or no elements."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def per_dimension(value: int | Sequence[int], dims: int) -> list[int]:
    """What PyTorch makes of an argument that is one for all dimensions, or one for each."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))


class OperationMode(TorchDispatchMode):
    """A mode that is handed operations, around each of which PyTorch keeps compilers off unless it
    is told that it need not: that takes longer than many an operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
