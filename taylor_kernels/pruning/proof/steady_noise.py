"""Runs without chance: one number in the place of all that is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.tracing.notes.operations import OperationMode

#: Operations that fill a tensor with draws of one kind, and the part of the name that says so.
_DRAWS = (
    "bernoulli", "rand", "randn", "normal", "uniform", "exponential", "log_normal", "cauchy",
    "geometric", "poisson", "standard_gamma",
)  # fmt: skip


class SteadyNoise(OperationMode):
    """Whatever is drawn at random is one number everywhere, and dropout drops nothing.

    Random numbers are drawn place after place, so that a place without its neighbours would get
    other ones. What is left out of them says nothing of how channels hang together. Generators
    stand still meanwhile, so that what draws whole numbers later (keys of an attention) has the
    same ones, however many channels there were.

    Args:
        lowest: uniform numbers are just above zero in place of just below one, less than whatever
            probability code compares them with. Their logarithms are finite.
    """

    def __init__(self, *, lowest: bool = False) -> None:
        super().__init__()
        self._uniform = 2.0**-24 if lowest else 1 - 2.0**-8

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        name = func._schema.name
        if (kind := _kind_of_draw(name)) is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if kind == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if not name.endswith("_"):
            generators = _generators((kwargs or {}).get("generator"))
            before = [generator.get_state() for generator in generators]
            out = func(*args, **(kwargs or {}))
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
        else:
            out = args[0]
        middle = _middle(kind, args, out)
        if middle is not None:
            return out.copy_(middle)
        return out.fill_(self._uniform if kind in ("rand", "uniform") else 1.0)


def _middle(kind: str, args: tuple, out: Tensor) -> Tensor | None:
    """What depends on channels that draws are made for, of those that take tensors of such."""
    if out is args[0] or not any(isinstance(value, Tensor) for value in args[:2]):
        return None  # written into a tensor, whose values are gone
    if kind == "normal":
        return args[0] + (args[1] if len(args) > 1 else 1.0)
    return args[0] if kind in ("poisson", "standard_gamma") else None


@cache
def _kind_of_draw(name: str) -> str | None:
    """What an operation of this name fills tensors with, or "native_dropout"; None for others."""
    own = name.rpartition("::")[2]
    kind = own.strip("_").removesuffix("_like")
    return own if own == "native_dropout" else kind if kind in _DRAWS else None


def _generators(given: torch.Generator | None) -> list[torch.Generator]:
    """Those that an operation may draw from."""
    if given is not None:
        return [given]
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if used else ())]
