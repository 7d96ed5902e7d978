"""The numbers of a config of transformers, by where they stand in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

#: An attribute of a config, or of a config inside it; the last part may be a place in a list.
Path = tuple[str | int, ...]
#: Names of widths.
_WIDTH = re.compile(r"(dim|size|inner|width|channels|features)$")


def is_config(value: object) -> bool:
    """Whether this is a config of transformers, or made like one."""
    return hasattr(value, "to_dict")


def integers(config: Any, before: Path = ()) -> Iterator[tuple[Path, int]]:
    """Every integer of a config, of those inside it, and of its lists."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if is_config(value):
            yield from integers(value, (*before, name))
        elif type(value) is int:
            yield (*before, name), value
        elif type(value) is list:
            yield from (((*before, name, i), v) for i, v in enumerate(value) if type(v) is int)


def left_out(config: Any, before: Path = ()) -> Iterator[Path]:
    """Every width of a config, and of those inside it, that is None."""
    for name, value in vars(config).items():
        if is_config(value):
            yield from left_out(value, (*before, name))
        elif value is None and _WIDTH.search(name):
            yield (*before, name)


def _at(config: Any, path: Path) -> Any:
    for part in path:
        config = config[part] if isinstance(part, int) else getattr(config, part)
    return config


def get_number(config: Any, path: Path) -> int | None:
    """The number at a place of a config; None where it is left to the class."""
    found: int | None = _at(config, path)
    return found


def set_number(config: Any, path: Path, value: int) -> None:
    """Put a number in a place of a config."""
    holder = _at(config, path[:-1])
    if isinstance(last := path[-1], int):
        holder[last] = value
    else:
        setattr(holder, last, value)


def set_numbers(config: Any, other: Any) -> None:
    """Every integer of a config as in another of its kind."""
    for path, value in list(integers(other)):
        if get_number(config, path) != value:
            set_number(config, path, value)


def shown(path: Path) -> str:
    """A place as code would write it: "text.widths[1]"."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
