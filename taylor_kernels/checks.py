"""Checks of arguments that several rooms make: an error names the argument and what it got."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn


def check_module(model: object, argument: str = "model") -> None:
    """The argument of this name is a module.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(model).__name__}")


def check_names(argument: str, names: object) -> list[str]:
    """An argument is a sequence of names, which may come out of a generator.

    Raises:
        ValueError: it is one string, whose letters would be taken for names.
        TypeError: it is something else, or holds something else.
    """
    if isinstance(names, str):
        raise ValueError(f"{argument}: expected a sequence of names, got the string {names!r}")
    if not is_iterable(names) or isinstance(names, (bytes, Tensor, nn.Module)):
        raise TypeError(f"{argument}: expected a sequence of names, got {type(names).__name__}")
    found = list(names)  # type: ignore[call-overload]
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names, got a {type(name).__name__} among them")
    return found


def check_flag(argument: str, value: object) -> None:
    """An argument is True or False; of anything else Python makes one of the two without a word.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}: expected True or False, got {value!r:.80}")


def check_choice(argument: str, value: object, known: Iterable[str]) -> None:
    """An argument is one of some words.

    Raises:
        ValueError: it is another word, or none.
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument}: {value!r:.80} is not one of {', '.join(known)}")


def check_path(path: object, argument: str = "path") -> None:
    """An argument is a path.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"{argument}: expected a path, got {type(path).__name__}")


def integer(argument: str, value: Any) -> int:
    """An argument as an int, which may be one of NumPy's.

    Raises:
        TypeError: it is no integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: expected an int, got {type(value).__name__}") from None


def check_count(name: str, value: object) -> None:
    """An argument is an integer of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def check_number(name: str, value: Any, fits: Callable[[float], bool], what: str) -> None:
    """An argument is a number that fits.

    Args:
        what: what is expected, in words.

    Raises:
        ValueError: it is not.
    """
    if not is_number(value) or not fits(value):
        raise ValueError(f"{name}: expected {what}, got {value!r:.80}")


def is_number(value: Any) -> bool:
    """Whether it is a real number and no bool; numpy's float32 is one."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_iterable(value: object) -> bool:
    """Whether it can be gone through, be it by `__getitem__` alone, as a dataset."""
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True
