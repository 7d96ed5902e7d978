"""Copies of models: what `copy.deepcopy` makes, without its cost for each of their many parts."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from contextlib import suppress
from functools import cache
from operator import is_not
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

#: Their values are never changed, so that copies share them, as those of `copy.deepcopy` do.
_CONSTANT = {type(None), bool, int, float, complex, str, bytes, type}


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy(model, memo)`.

    A module keeps a dozen tables, most of them empty, which `copy.deepcopy` takes apart one by one.
    Here modules that leave their copying to pickle's protocol are copied table by table. All
    others, and what else modules hold, go to `copy.deepcopy` with the memo of what was copied here.

    Functions that code has put into modules, hooks among them, know the copies in place of modules
    that they have known: those that `copy.deepcopy` leaves would run parts of the model itself.
    """
    memo = {} if memo is None else memo
    states: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        module_class: type = type(module)
        if _follows_protocol(module_class) and "__deepcopy__" not in module.__dict__:
            state = module.__getstate__()
            if type(state) is dict:
                memo[id(module)] = new = type(module).__new__(type(module))
                states.append((new, state))
    for new, state in reversed(states):  # children first: parents may look into them
        new.__setstate__(
            {
                name: value if type(value) in _CONSTANT else _value(value, memo)
                for name, value in state.items()
            }
        )
    return copy.deepcopy(model, memo)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what is no constant."""
    kind = type(value)
    if (known := memo.get(id(value))) is not None:
        return known
    if kind is FunctionType:
        return _function(value, memo)
    if kind is nn.Parameter:
        return value.__deepcopy__(memo)
    if kind is Tensor and (new := _tensor(value, memo)) is not None:
        return new
    if kind is tuple and all(type(part) in _CONSTANT for part in value):
        return value
    if kind is dict or kind is OrderedDict:
        table = memo[id(value)] = kind()
        for key, part in value.items():
            new = key if type(key) in _CONSTANT else copy.deepcopy(key, memo)
            table[new] = part if type(part) in _CONSTANT else _value(part, memo)
        return table
    if kind is list and all(type(part) is FunctionType for part in value):
        listed = memo[id(value)] = []
        listed += [_function(part, memo) for part in value]
        return listed
    return copy.deepcopy(value, memo)


def _function(value: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function that knows copies of what it remembers; itself where it remembers no module."""
    if (known := memo.get(id(value))) is not None:
        return known
    old = value.__closure__ or ()
    cells = tuple(CellType() for _ in old)
    defaults = tuple(_known_to_function(part, memo) for part in value.__defaults__ or ())
    new = FunctionType(value.__code__, value.__globals__, value.__name__, defaults or None, cells)
    new.__kwdefaults__ = value.__kwdefaults__
    new.__dict__.update(value.__dict__)
    memo[id(value)] = new  # which it may remember itself
    other = any(map(is_not, defaults, value.__defaults__ or ()))
    for cell, before in zip(cells, old, strict=True):
        with suppress(ValueError):  # nothing is in it yet
            content = before.cell_contents
            cell.cell_contents = _known_to_function(content, memo)
            other |= cell.cell_contents is not content
    if not other:
        memo[id(value)] = value
    return memo[id(value)]


def _known_to_function(value: Any, memo: dict[int, Any]) -> Any:
    """The copy of a module, its method, or a function; what else a function remembers is shared."""
    kind = type(value)
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if kind is FunctionType:
        return _function(value, memo)
    if kind is MethodType and isinstance(value.__self__, nn.Module):
        owner = memo.get(id(value.__self__), value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if kind is list or kind is tuple:
        parts = [_known_to_function(part, memo) for part in value]
        return kind(parts) if any(map(is_not, parts, value)) else value
    return value


def _tensor(value: Tensor, memo: dict[int, Any]) -> Tensor | None:
    """A copy of a tensor that is all of its memory, as most buffers are; None for others.

    `Tensor.__deepcopy__` takes ten times as long. Tensors that share this memory find its copy in
    the memo, where `Tensor.__deepcopy__` looks for it.
    """
    if value.requires_grad or value.layout != torch.strided or value.is_quantized or vars(value):
        return None
    if not value.is_contiguous() or value.is_conj() or value.is_neg():
        return None
    memory = value.untyped_storage()
    copies = memo.setdefault("torch", {})  # type: ignore[call-overload]
    whole = memory.nbytes() == value.numel() * value.element_size()
    if not whole or memory._cdata in copies:
        return None
    new = memo[id(value)] = value.clone()
    copies[memory._cdata] = new.untyped_storage()
    return new


@cache
def _follows_protocol(module_class: type) -> bool:
    """Whether a copy is a new instance that `__setstate__` gets a copy of `__getstate__()`."""
    return (
        module_class.__new__ is object.__new__
        and module_class.__reduce_ex__ is object.__reduce_ex__
        and module_class.__reduce__ is object.__reduce__
        and not any(
            hasattr(module_class, name)
            for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
        )
        and module_class not in copyreg.dispatch_table
        and not any("__slots__" in vars(parent) for parent in module_class.__mro__)
    )
