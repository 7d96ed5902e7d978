"""A model is afterwards as it was, whatever its code has done in a run."""

from __future__ import annotations

import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taylor_kernels.tracing.model.caches import COMMON
from taylor_kernels.tracing.notes.operations import address_of

#: What nn.Module keeps in dictionaries; hooks that a first run installs are to go with it.
_TABLES = (
    "_buffers", "_parameters", "_modules",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
#: Values of these types cannot change, or are code.
_CONSTANT = {
    type(None), bool, int, float, complex, str, bytes, type, torch.device, torch.dtype, torch.Size,
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType,
}  # fmt: skip
_DICTS = {dict, OrderedDict, defaultdict, Counter}
_CONTAINERS = {*_DICTS, list, set, deque}
#: What is in longer containers is not looked at.
_FEW = 1000


class Untouched:
    """Puts a model back as it was: modes, buffers, parameters, hooks, attributes, values.

    So it does with what attributes hold: containers and plain objects that code fills in, and
    sources of random numbers. Values are copied only when something is about to be written into
    them.

    Args:
        tensors: those whose values, memory and `requires_grad` are put back.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        self._modules = [(module, dict(module.__dict__)) for module in modules]
        self._classes = [type(module) for module in modules]
        self._modes = [(module, module.training) for module in modules]
        tables: list[Any] = []
        for _, attributes in self._modules:
            tables += map(attributes.get, _TABLES)
        # A ScriptModule's are views. Of others most are empty.
        self._empty = [table for table in tables if not table and isinstance(table, dict)]
        self._tables = [(t, dict(t)) for t in filter(None, tables) if isinstance(t, dict)]
        self._containers: list[tuple[Any, Any]] = []
        self._sources: list[tuple[Callable[[Any], object], Any]] = []
        self._seen: set[int] = set()
        for _, attributes in self._modules:
            for name, value in attributes.items():
                if type(value) not in _CONSTANT and name not in COMMON:
                    self._hold(value, objects=True)
        self._tensors = [(t, t.data, t.requires_grad) for t in tensors if _has_memory(t)]
        self._watched: dict[int, list[Tensor]] = {}
        for _, values, _ in self._tensors:
            self._watched.setdefault(values.untyped_storage()._cdata, []).append(values)
        self._saved: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._replaced: set[int] = set()

    def _hold(self, value: Any, *, objects: bool) -> None:
        """Remember what is in a container or an object, and in what that holds.

        Args:
            objects: also if it is a plain object; those that others hold are the user's own, as a
                trainer's are.
        """
        kind = type(value)
        if kind in _CONSTANT or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if kind in _CONTAINERS or kind is tuple:
            if kind is not tuple:
                self._containers.append((value, value.copy()))
            if len(value) <= _FEW:
                for part in value.values() if kind in _DICTS else value:
                    self._hold(part, objects=objects)
        elif (source := _source(value)) is not None:
            self._sources.append(source)
        elif (
            objects
            and not isinstance(value, (Tensor, nn.Module, type))
            # The table of a proxy may be another object's, and no dictionary.
            and type(table := getattr(value, "__dict__", None)) is dict
        ):
            self._hold(table, objects=False)

    def touch(self, tensor: Tensor) -> None:
        """Something is about to be written into this tensor."""
        if tensor.layout != torch.strided:
            return
        key = tensor.untyped_storage()._cdata
        if key in self._watched and key not in self._saved:
            self._saved[key] = [(mine, mine.clone()) for mine in self._watched[key]]

    def was_written(self, tensor: Tensor) -> bool:
        """Whether code has written into one of these tensors so far, or given it other memory."""
        if id(tensor) in self._replaced:
            return True
        # Most runs write into none.
        return (
            bool(self._saved)
            and _has_memory(tensor)
            and tensor.untyped_storage()._cdata in self._saved
        )

    def restore(self) -> bool:
        """The model is as it was; this can be done again after another run.

        Returns:
            Whether its modules, or what these hold, had other parts than now.
        """
        changed = False
        with torch.no_grad():
            for tensor, values, needs_grad in self._tensors:
                if address_of(tensor) != address_of(values) or tensor.shape != values.shape:
                    tensor.data = values  # code has put another one in its place
                    self._replaced.add(id(tensor))
                if tensor.requires_grad is not needs_grad and tensor.is_leaf:
                    tensor.requires_grad_(needs_grad)
            for saved in self._saved.values():
                for values, before in saved:
                    values.copy_(before)
        for (module, attributes), own in zip(self._modules, self._classes, strict=True):
            if type(module) is not own:
                module.__class__, changed = own, True
            changed |= _put_back(module.__dict__, attributes)
        for module, training in self._modes:
            if module.training != training:  # a ScriptModule keeps it elsewhere
                module.training = training
        for table, entries in self._tables:
            changed |= _put_back(table, entries)
        for table in filter(None, self._empty):
            table.clear()
            changed = True
        for value, before in self._containers:
            changed |= _put_back(value, before)
        for put_back, state in self._sources:
            put_back(state)
        return changed


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not torch.nn.parameter.is_lazy(tensor)


def _put_back(value: Any, before: Any) -> bool:
    """Give a container its entries again, if it has others or another order of them."""
    if _same(value, before):
        return False
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(before)
    else:
        value.update(before)
    return True


def _same(one: Any, other: Any) -> bool:
    """The same objects under the same names in the same order; a model has thousands of these."""
    return (
        len(one) == len(other)
        and (not isinstance(one, dict) or all(map(is_, one.values(), other.values())))
        and (one == other if isinstance(one, set) else all(map(is_, one, other)))
    )


def _source(value: Any) -> tuple[Callable[[Any], object], Any] | None:
    """How a source of random numbers is put back, and its state; None for others."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.RandomState):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda state: setattr(bits, "state", state), bits.state
    if isinstance(value, random.Random):
        return value.setstate, value.getstate()
    return None
