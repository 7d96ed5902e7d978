"""The Python code that runs: whose it is, and what it says."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch.utils import checkpoint

#: What runs the code of a module.
_CALLS = inspect.unwrap(nn.Module._call_impl).__code__


def _frames() -> Iterator[FrameType]:
    """What runs, innermost first, up to the call of a module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        if frame.f_code is _CALLS:
            return
        frame = frame.f_back


def running_module() -> object:
    """The module whose code runs, or has called the functions that run; None outside of all."""
    last = None
    for frame in _frames():
        last = frame
    return None if last is None or last.f_code is not _CALLS else last.f_locals["self"]


def own_module() -> nn.Module | None:
    """The module that the innermost of that code is a method of."""
    for frame in _frames():
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            found = frame.f_locals.get("self")
            if isinstance(found, nn.Module):
                return found
    return None


def is_run_again() -> bool:
    """Whether that code is called by a checkpoint (torch.utils), which runs it again in backward()
    without calling the module."""
    return any(frame.f_code.co_filename == checkpoint.__file__ for frame in _frames())


def says(number: int) -> bool:
    """Whether that code has this number written in it."""
    for frame in _frames():
        for value in frame.f_code.co_consts:
            if value == number or (isinstance(value, tuple) and number in value):
                return True
    return False
