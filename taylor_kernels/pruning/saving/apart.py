"""States taken apart: tensors by name, and all else with tensors without memory in their places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.pruning.saving.optimizer_saving import concerned
from taylor_kernels.shards import is_sharded


def without_memory(value: Any, name: str, entries: dict[str, Tensor]) -> Any:
    """A state with tensors of no memory in the place of its own, which are added to the entries.

    Raises:
        ValueError: two of its tensors have one name.
    """

    def moved(tensor: Tensor, key: str) -> Tensor:
        if key in entries:
            raise ValueError(f"{name}: two tensors of its state are called {key!r}")
        entries[key] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _mapped(value, name, moved)


def with_memory(
    value: Any, name: str, entries: dict[str, Tensor], like: Callable[[str], Any]
) -> Any:
    """The same with memory for every tensor, in parts where the one that it is for is in parts."""

    def made(tensor: Tensor, key: str) -> Tensor:
        other = like(key.removeprefix(f"{name}."))
        if is_sharded(other) and other.shape == tensor.shape:
            entries[key] = torch.empty_like(other.detach(), dtype=tensor.dtype)
        else:
            entries[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return entries[key]

    return _mapped(value, name, made)


def _mapped(value: Any, key: str, change: Callable[[Tensor, str], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value, key)
    if isinstance(value, Mapping):
        found: Any = copy.copy(value)  # with the versions that a model's has as attributes
        found.update({k: _mapped(one, f"{key}.{k}", change) for k, one in value.items()})
        return found
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, f"{key}.{k}", change) for k, one in enumerate(value))
    return value


def followed_by(saved: Any, optimizer: Any) -> Callable[[str], Tensor | None]:
    """The parameter that a tensor of an optimizer's state belongs to, by its key."""
    own = [] if optimizer is None else concerned(optimizer)
    states: dict[str, Any] = {"": saved}
    if isinstance(saved, list):
        states = {f"{number}.": one for number, one in enumerate(saved)}
    parameters: dict[str, Tensor] = {}
    for (prefix, state), one in zip(states.items(), own, strict=False):
        for saved_group, group in zip(state["param_groups"], one.param_groups, strict=False):
            for number, p in zip(saved_group["params"], group["params"], strict=False):
                parameters[f"{prefix}state.{number}"] = p
    return lambda key: parameters.get(key.rpartition(".")[0])
