"""Double precision for what PyTorch makes in the default one, without a change of the default.

`torch.set_default_dtype` is of the whole process: a model that another thread makes meanwhile would
be in double precision too. Modes are of one thread. The default decides on tensors that are made of
Python's numbers (`torch.zeros(3)`), and on what operations make of integers (a root, a division):
that is, on results of a lower precision that are made of no tensor of floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from taylor_kernels.tracing.notes.operations import OperationMode

#: Lower precision -> what stands for it in a run in double precision.
WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def wider(value: Any) -> Any:
    """A dtype of double precision for one of a lower; other values as they are."""
    return WIDER.get(value, value) if value.__class__ is torch.dtype else value


def widened(value: Any) -> Any:
    """A tensor of floating-point numbers in double precision; other values as they are."""
    return value.to(WIDER.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def made_in_double(
    func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], out: Tensor
) -> Tensor:
    """What a function has made, made in double precision if the default precision was its own.

    It is run again, since a number that has gone through float32 is another number, or none.

    Args:
        out: func(*args, **kwargs), in a lower precision.
    """
    if any(t.is_floating_point() or t.is_complex() for t in _tensors((args, kwargs))):
        return out  # it is as precise as what it is made of
    wide, same = WIDER[out.dtype], (args, dict(kwargs))
    for given, options in (
        (args, {**kwargs, "dtype": wide}),  # numbers become a tensor
        tree_map(_numbers_doubled, same),  # a mask that chooses among integers stays one
        tree_map(_as_tensor, same),  # or chooses between two numbers of Python's
        tree_map(_doubled, same),
    ):
        try:
            found = func(*given, **options)
        except (RuntimeError, TypeError, ValueError):  # no such argument, or it has to be integers
            continue
        if isinstance(found, Tensor) and found.dtype == wide:
            return found
    return out.to(wide)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _doubled(value: Any) -> Any:
    """A tensor of integers or truth values in double precision."""
    return value.double() if isinstance(value, Tensor) and not value.is_quantized else value


def _numbers_doubled(value: Any) -> Any:
    truth = isinstance(value, Tensor) and value.dtype is torch.bool
    return value if truth else _doubled(value)


def _as_tensor(value: Any) -> Any:
    """A number of Python's as a tensor of double precision."""
    return torch.tensor(value, dtype=torch.float64) if value.__class__ is float else value


def _read_in_double(func: Any, args: tuple) -> Iterator[Any]:
    """Arguments of an operation, those that it only reads in double precision."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        yield value if written else tree_map(widened, value)


class InDoubleBelow(OperationMode):
    """All operations make double precision, those too that Python does not call."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        args = tuple(map(wider, args))
        kwargs = {name: wider(value) for name, value in (kwargs or {}).items()}
        try:
            out = func(*args, **kwargs)
        except RuntimeError:  # one of them may come from `torch.Tensor([0.5])`, which no mode sees
            out = func(*_read_in_double(func, args), **kwargs)
        if out.__class__ is Tensor and out.dtype in WIDER:
            return made_in_double(func, args, kwargs, out)
        return out
