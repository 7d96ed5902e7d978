"""Runs whose results do not depend on how many channels a model has: exact, and without chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS: dict[Any, Any] = {
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
    Tensor.float: Tensor.double,
    Tensor.cfloat: Tensor.cdouble,
}


def widened(tensor: Tensor) -> Tensor:
    """In double precision, if it holds floating-point numbers."""
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


class InDouble(TorchFunctionMode):
    """What code would cast to, or make in, a lower precision is in double precision."""

    def __enter__(self) -> InDouble:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        args = tuple(_wider(value) for value in args)
        kwargs = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return _CASTS.get(func, func)(*args, **kwargs)


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


#: Operations that fill a tensor with draws of one kind, and the part of the name that says so.
_DRAWS = ("bernoulli", "rand", "randn", "normal", "uniform", "exponential", "log_normal", "cauchy")


class SteadyNoise(TorchDispatchMode):
    """Whatever is drawn at random is one number everywhere, and dropout drops nothing.

    Random numbers are drawn place after place, so that a place without its neighbours would get
    other ones. What is left out of them says nothing of how channels hang together.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2].strip("_").removesuffix("_like")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **(kwargs or {}))
        return out.fill_(1.0) if name in _DRAWS else out
