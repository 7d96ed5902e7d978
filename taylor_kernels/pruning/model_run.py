"""Running a model on its example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested containers, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from tensors_in(vars(value))


def call(model: nn.Module, example_inputs: Any) -> Any:
    """model(*args) for a tuple or list, model(**kwargs) for a mapping, model(x) for the rest."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Inside, tensors are made that can be trained on later, whatever mode the caller is in."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """The random state of every device is afterwards what it was."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
        yield
