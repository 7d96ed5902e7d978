"""Numbers that a module keeps in an object of settings: a config, a namespace, a dictionary.

All layers of a model mostly share one such object, and code cuts channels by its numbers
(`self.config.n_head`). Where the channels of one layer become fewer, that layer gets a copy of its
own. Such a number goes by the name "config.n_head".
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from taylor_kernels.tracing.model.caches import COMMON

#: What is code, or holds channels itself.
_OTHERS = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)

#: Where `Rearrange` and `Reduce` of einops keep sizes: what they run with is made of it once.
_OF_EINOPS = "axes_lengths"


def held_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The integers in a module's objects of settings, and in lists of these, by their names."""
    for name, value in vars(module).items():
        if name not in COMMON and (table := _table(value)):
            for key, held in table.items():
                if not isinstance(key, str):
                    continue
                if type(held) is int:
                    yield f"{name}.{key}", held
                elif type(held) in (list, tuple):
                    numbers = [(i, number) for i, number in enumerate(held) if type(number) is int]
                    if len(numbers) == len(held):
                        yield from ((f"{name}.{key}[{i}]", number) for i, number in numbers)


def get_attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or a number in an object of settings; None if there is none."""
    holder, _, key = name.partition(".")
    value = vars(module).get(holder)
    return (_table(value) or {}).get(key) if key else value


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """Set an attribute, or a number in a copy of an object of settings, which is the module's."""
    holder, _, key = name.partition(".")
    if key:
        new = copy.copy(getattr(module, holder))
        table = _table(new)
        assert table is not None
        table[key] = value  # past checks of a frozen class
        value = new
    setattr(module, holder, value)
    if holder == _OF_EINOPS and hasattr(module, f"_{holder}"):
        setattr(module, f"_{holder}", tuple(new.items()))


def _table(value: object) -> dict[Any, Any] | None:
    """Names and values in an object of settings; None for what is none."""
    if type(value) is dict:
        return value
    if value is None or isinstance(value, _OTHERS):
        return None
    table = getattr(value, "__dict__", None)
    return table if type(table) is dict else None
