"""The Python code that runs: whose it is, and what it says."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch import nn
from torch.utils import checkpoint

from taylor_kernels.tracing.model.branches import only_asserts

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


#: Lines and columns of what runs, innermost first, without the code of PyTorch and this package.
Place = tuple[tuple[int, int], ...]
#: Where that code lies.
_OTHERS = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(torch.__file__).parent,
        *(Path(__file__).parents[2] / room for room in ("tracing", "pruning")),
    )
)
#: Code that runs between that of a model and a trace: this package's, and what makes others of an
#: operation.
_OPERATIONS = (*_OTHERS[1:], torch._ops.__file__)
#: How torch.compile names the second part of a function that it has cut; the first part calls it.
_RESUMED = "torch_dynamo_resume_in_"


class Running(NamedTuple):
    """What runs.

    Attributes:
        module: the one whose code runs, or has called the functions that run; None outside of all.
        again: a checkpoint (torch.utils) has called it, which runs it again in backward() without
            calling the module.
        place: where in the code.
    """

    module: object
    again: bool
    place: Place


def running() -> Running:
    """The code that runs, seen once from the inside out."""
    module, again, first_part = None, False, False
    place: list[tuple[int, int]] = []
    codes: list[CodeType] = []  # of the frames in `place`
    for frame in _frames():
        code = frame.f_code
        if code is _CALLS:
            module = frame.f_locals["self"]
            # What code of others has put around forward() later is no part of the place.
            forward = getattr(type(module).forward, "__code__", None)
            if forward in codes:
                del place[len(codes) - codes[::-1].index(forward) :]
        elif code.co_filename == checkpoint.__file__:
            again = True
        elif not code.co_filename.startswith(_OTHERS):
            if not first_part:
                place.append((frame.f_lineno, _column(code, frame.f_lasti)))
                codes.append(code)
            first_part = code.co_name.startswith(_RESUMED)
    return Running(module, again, tuple(place))


@lru_cache(maxsize=4096)
def _column(code: CodeType, instruction: int) -> int:
    """The column of an instruction; 0 where Python keeps none (before 3.11)."""
    if not hasattr(code, "co_positions"):
        return 0
    return next(islice(code.co_positions(), instruction // 2, None), (0, 0, 0, 0))[2] or 0


def own_module() -> nn.Module | None:
    """The module that the innermost of that code is a method of."""
    for frame in _frames():
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            found = frame.f_locals.get("self")
            if isinstance(found, nn.Module):
                return found
    return None


def only_asserts_now() -> bool:
    """Whether the model's code asks for a truth just now that decides on nothing else than whether
    an error is raised."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OPERATIONS):
        frame = frame.f_back
    return frame is not None and only_asserts(frame, _callers(frame))


def _callers(frame: FrameType) -> Iterator[FrameType]:
    """The frames of code of others that have called this one, up to the run of the model."""
    outer = frame.f_back
    while outer is not None and outer.f_code.co_name != "run_once":
        if not outer.f_code.co_filename.startswith(_OTHERS):
            yield outer
        outer = outer.f_back


def says(number: int) -> bool:
    """Whether that code has this number written in it."""
    for frame in _frames():
        for value in frame.f_code.co_consts:
            if value == number or (isinstance(value, tuple) and number in value):
                return True
    return False
