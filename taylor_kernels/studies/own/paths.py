"""What an import path of the user's names, and their code called so that a mistake is one line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taylor_kernels.studies.options import Mistake

_PACKAGE = Path(__file__).parents[2]


def find(option: str, path: str) -> Any:
    """What "package.module:name" names; modules of the working directory are found too.

    Raises:
        Mistake: there is no such thing, or importing it fails.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise Mistake(
            f"{option}: {path!r} is not an import path; write package.module:name, such as "
            "mymodels.resnet:make_model"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise Mistake(
                f"{option}: there is no module {error.name!r}, neither installed nor in "
                f"{os.getcwd()}"
            ) from None
        raise Mistake(f"{option}: importing {module_name} failed: {describe(error)}") from None
    except (Exception, SystemExit) as error:
        raise Mistake(f"{option}: importing {module_name} failed: {describe(error)}") from None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise Mistake(f"{option}: {module_name} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def made(option: str, path: str, factory: Callable[[], Any]) -> Any:
    """What a factory without arguments makes.

    Raises:
        Mistake: it wants arguments, or raises.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # built in, and says nothing of itself
        signature = inspect.Signature()
    try:
        signature.bind()
    except TypeError:
        wanted = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        raise Mistake(
            f"{option}: {path} wants arguments ({', '.join(wanted)}); name a function that takes "
            "none and passes them on"
        ) from None
    with naming(f"{option}: {path}()"):
        return factory()


def find_function(option: str, path: str) -> Callable[..., Any]:
    """The function that a path names.

    Raises:
        Mistake: there is none, or it cannot be called.
    """
    function = find(option, path)
    if not callable(function):
        raise Mistake(f"{option}: {path} is a {type(function).__name__}, not a function")
    return function


@contextmanager
def naming(what: str) -> Iterator[None]:
    """An error of the user's code becomes one line that says where."""
    try:
        yield
    except Mistake:
        raise
    except (Exception, SystemExit) as error:
        raise Mistake(f"{what} raised {describe(error)}") from error


def describe(error: BaseException) -> str:
    """The error, and the line of the user's where it came from."""
    beside = (str(_PACKAGE), "site-packages", "<frozen")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(part in frame.filename for part in beside):
            return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}"
