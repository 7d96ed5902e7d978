"""Stand-ins for packages that a library imports and the tests do not use."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

_TENSORBOARD = "torch.utils.tensorboard"  # is there, but raises where tensorboard is not
#: What Avalanche imports for its data sets and loggers; torchvision would replace a CPU build.
OF_AVALANCHE = ("torchvision", "gdown", "GPUtil", "wandb", "qpsolvers", _TENSORBOARD)


class _Anything(type):
    """A class with all attributes, which are classes of this kind."""

    def __getattr__(cls, name: str) -> type:
        return _attribute(name)


def _attribute(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of some packages, whatever their name; each attribute of one is a class."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if not _is_in(name, self._packages):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _attribute  # type: ignore[method-assign]


def _is_there(package: str) -> bool:
    if package != _TENSORBOARD:
        return importlib.util.find_spec(package) is not None
    try:  # it is found without what it needs
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@contextmanager
def stubs_of(packages: Sequence[str]) -> Iterator[None]:
    """Inside, those of the packages that are not installed can be imported all the same."""
    packages = [p for p in packages if not _is_there(p)]
    with suppress(ImportError):  # it asks once, and remembers what it was told
        from transformers.utils import is_torchvision_available

        is_torchvision_available()
    finder = _Stubs(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # Others ask whether these are there, and must not be told that they are.
        for name in [name for name in sys.modules if _is_in(name, packages)]:
            around, _, leaf = name.rpartition(".")
            vars(sys.modules.get(around, ModuleType(""))).pop(leaf, None)
            del sys.modules[name]


def _is_in(name: str, packages: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)
