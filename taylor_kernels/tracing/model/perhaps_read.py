"""Which tensors that no run has read another run of the same model may read.

Code reaches a tensor by the names on its path. Where no code that a forward pass may lead to speaks
of one of these, as of a layer that a config has put aside, nothing reads it. What chance decides
in a module decides what that module's code does, and the modules in it.
"""

from __future__ import annotations

import re
import sys
import types
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Set
from contextlib import suppress
from inspect import Parameter, Signature
from itertools import chain
from logging import Logger
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

#: By these, code reaches modules and tensors without naming them.
_UNNAMED = {"children", "named_children", "_modules", "_parameters", "_buffers"}
#: By these too, in methods; functions that know nothing of the model ask so for other things.
_BY_STRINGS = {
    "getattr", "attrgetter", "methodcaller", "vars", "__dict__", "eval", "exec", "modules",
    "named_modules", "parameters", "named_parameters", "buffers", "named_buffers", "state_dict",
    "get_submodule", "get_parameter", "get_buffer",
}  # fmt: skip
#: Where other callables than functions hold those that they call.
_PARTS = ("__func__", "__wrapped__", "func", "args", "keywords", "fget")
_PLAIN = {str, bytes, int, float, complex, bool, type(None)}
_NO_CODE = (Tensor, nn.Module, *_PLAIN)
_LISTS, _DICTS = {list, tuple, set, frozenset}, {dict, OrderedDict}
#: What is written in C, or only describes code.
_INERT = {
    *_PLAIN, Signature, Parameter, Logger, re.Pattern, types.UnionType,
    types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType,
}  # fmt: skip
#: So much code is looked at; more may speak of anything.
_MOST = 2**15
#: Packages whose code knows nothing of a model's own names: of numbers, and those of files and
#: networks to which saving and loading a model leads, which are the most code by far.
_FOREIGN = {
    *sys.stdlib_module_names, "torch", "numpy", "huggingface_hub", "httpx", "httpx2", "httpcore",
    "httpcore2", "requests", "urllib3", "filelock", "psutil", "tqdm", "packaging", "yaml",
}  # fmt: skip


def perhaps_read(
    unread: Collection[str], modules: Mapping[str, nn.Module], asked: Collection[str] = ("",)
) -> list[str]:
    """Those of these tensors that another run may read.

    Args:
        unread: names of parameters and buffers.
        modules: dict(model.named_modules()).
        asked: the modules whose code may do something else in another run.
    """
    if not unread:  # of most models everything is read
        return []
    paths = _paths(modules[""])
    inside = tuple(f"{module}." if module else "" for module in asked)
    found = {
        name: [path for path in paths.get(name, [name]) if path.startswith(inside)]
        for name in unread
    }
    if not any(found.values()):
        return []
    spoken = _Spoken(modules[""])
    return [name for name, every in found.items() if any(map(spoken.reaches, every))]


def _paths(model: nn.Module) -> dict[str, list[str]]:
    """The first name of a tensor -> all of its names."""
    every: dict[int, list[str]] = {}
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            every.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in every.values()}


class _Spoken:
    """The names that code speaks of which a forward pass may lead to.

    That is the code of `forward`, of methods of the model's classes by names that it speaks of, of
    what these names are in its Python module, and of what modules hold as attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._classes = {type(m) for m in self._modules.values() if not _is_foreign(type(m))}
        self._parents = {parent for own in self._classes for parent in own.__mro__}
        self._own = {parent.__module__ for parent in self._parents}
        self._methods: dict[str, list[Any]] = {}
        for parent in self._parents:
            if not _is_foreign(parent):
                for name, value in vars(parent).items():
                    self._methods.setdefault(name, []).append(value)
        self._names = {"__init__"}  # which has run
        self._codes: set[int] = set()  # ids: to hash code takes long
        self._seen: dict[int, Any] = {}  # the values, so that their numbers stay theirs
        self._waiting: list[Any] = []
        for module in self._modules.values():
            self._wait_for(vars(module).values())
        self._unnamed = False
        self._speak({"forward", "__call__"})
        while self._waiting and not self._unnamed:
            self._follow(self._waiting.pop())
        self._any = {own for own in self._classes if self._asks_by_strings(own)}

    def reaches(self, path: str) -> bool:
        """Whether code may reach the tensor of this name."""
        outer = ""
        for part in path.split("."):
            own = type(self._modules.get(outer))
            if own in self._classes - self._any and part not in self._names:
                return self._unnamed
            outer = f"{outer}.{part}" if outer else part
        return True

    def _speak(self, names: Set[str]) -> None:
        if not (new := names - self._names):
            return
        self._names |= new
        for name in new & self._methods.keys():
            self._waiting += self._methods[name]

    def _wait_for(self, values: Iterable[Any]) -> None:
        """These are to be followed. Most are numbers, words or known already, or hold nothing."""
        seen = self._seen
        self._waiting += [
            value
            for value in values
            if (kind := type(value)) not in _INERT
            and id(value) not in seen
            and ((kind not in _LISTS and kind not in _DICTS) or value)
        ]

    def _follow(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        kind = type(value)
        if kind is FunctionType:
            if not _is_foreign(value):
                self._read(value)
        elif kind in _LISTS:
            self._wait_for(value)
        elif kind in _DICTS:
            self._wait_for(value.values())
        elif isinstance(value, _NO_CODE):
            pass
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._wait_for(value)
        elif isinstance(value, Mapping):
            self._wait_for(value.values())
        elif isinstance(value, type):
            # Methods of the model's classes are called by names.
            if value not in self._parents and not _is_foreign(value):
                self._wait_for([*vars(value).values(), *value.__bases__])
        elif not isinstance(value, ModuleType):
            parts = (getattr(value, name, None) for name in _PARTS)
            self._wait_for([type(value), *getattr(value, "__dict__", {}).values(), *parts])

    def _read(self, function: FunctionType) -> None:
        codes = _codes(function.__code__)
        self._codes.update(map(id, codes))
        self._unnamed |= len(self._codes) > _MOST
        names = set(chain.from_iterable(code.co_names for code in codes))
        if function.__module__ in self._own:
            self._unnamed |= not names.isdisjoint(_UNNAMED)
        self._speak(names)
        # Most of what code speaks of are attributes, which are no names of its Python module.
        known = function.__globals__
        used = [known[name] for name in names if name in known]
        for value in used:
            if isinstance(value, ModuleType) and not _is_foreign(value):
                inside = vars(value)
                self._wait_for([inside[name] for name in names if name in inside])
        self._wait_for(used)
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # it is empty
                self._waiting.append(cell.cell_contents)

    def _asks_by_strings(self, own: type) -> bool:
        """Whether code of this class asks for attributes by names that it does not speak of."""
        return any(
            id(code) in self._codes and not _BY_STRINGS.isdisjoint(code.co_names)
            for parent in own.__mro__
            if not _is_foreign(parent)
            for method in vars(parent).values()
            for code in _codes(getattr(method, "__code__", None))
        )


def _is_foreign(value: Any) -> bool:
    """Whether code knows nothing of a model's own names: it is of Python, PyTorch or the like."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return (name or "").partition(".")[0] in _FOREIGN


def _codes(code: CodeType | None) -> list[CodeType]:
    """Code, and that of what is defined in it."""
    found = [] if code is None else [code]
    for each in found:
        found += [value for value in each.co_consts if type(value) is CodeType]
    return found
