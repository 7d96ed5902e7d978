"""A model as a program of torch.export, which runs without the code of the model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.tracing.run.running import tensors_in


def exported(model: nn.Module, few: Any) -> tuple[Any, str]:
    """The program of a model, and its minibatches: of "any" size where that works, else "fixed".

    Args:
        few: a minibatch; of what cannot be of any size the program takes as many examples.
    """
    args, kwargs = _arguments(few)
    model = _with_plain_outputs(model)
    if has_batch(few):
        dim = torch.export.Dim("batch", min=1)
        length = next(tensors_in(few)).size(0)

        def free(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() and value.size(0) == length
            return {0: dim} if batched else None

        shapes: Any = tuple(tree_map(free, value) for value in args)
        if kwargs:
            shapes = {name: tree_map(free, value) for name, value in kwargs.items()}
        with contextlib.suppress(Exception):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes), "any"
    return torch.export.export(model, args, kwargs), "fixed"


def has_batch(inputs: Any) -> bool:
    """Whether there are two examples at least: one would be taken for a constant."""
    first = next(tensors_in(inputs), None)
    return first is not None and first.dim() > 0 and first.size(0) >= 2


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _with_plain_outputs(model: nn.Module) -> nn.Module:
    """A copy whose outputs are of no class of its own, so that a program of it needs no import.

    What a dataclass or a mapping holds comes in a dict, without what is None.
    """
    model = copy.deepcopy(model)
    run = model.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _plain(run(*args, **kwargs))

    model.forward = forward
    return model


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value)) if type(value) is list else tuple(map(_plain, value))
    else:
        return value
    return {name: _plain(item) for name, item in items if item is not None}
