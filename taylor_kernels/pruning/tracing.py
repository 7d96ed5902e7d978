"""Running a model on its example inputs, and Torch-Pruning's dependency graph of that run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
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
def preserved_rng() -> Iterator[None]:
    """The random state of every device is afterwards what it was."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
        yield


def matching(model: nn.Module, patterns: Sequence[str | nn.Module]) -> set[str]:
    """The names of the modules that `patterns` name, and of all modules inside them.

    Raises:
        ValueError: an entry matches nothing.
        TypeError: `patterns`, or an entry, is something else.
    """
    if isinstance(patterns, (str, nn.Module)):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable):
        raise TypeError(
            "ignore: expected a sequence of module names, patterns or modules, () for none, got "
            f"{patterns!r}"
        )
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            found = [name for name in names if fnmatchcase(name, pattern)]
        elif isinstance(pattern, nn.Module):
            found = [name for name, module in names.items() if module is pattern]
        else:
            raise TypeError(
                f"ignore: entries are module names, patterns or modules, got {pattern!r}"
            )
        if not found:
            shown = pattern if isinstance(pattern, str) else type(pattern).__name__
            raise ValueError(
                f"ignore: {shown!r} matches no module of the model; there are "
                f"{', '.join(list(names)[:20])}{', ...' if len(names) > 20 else ''}"
            )
        chosen |= {n for n in names if any(n == f or n.startswith(f + ".") for f in found)}
    # A shared module goes by its first name everywhere else.
    first = {module: name for name, module in model.named_modules()}
    return {first[names[name]] for name in chosen}


def trace(model: nn.Module, example_inputs: Any) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "tk.Pruner needs Torch-Pruning for the dependency graph: pip install torch-pruning"
        ) from error
    model.requires_grad_(True)

    def forward(model: nn.Module, inputs: Any) -> list[Tensor]:
        # Multiplied by one, every output becomes a node of its own: Torch-Pruning marks an
        # output as such only if no layer computes it directly.
        outputs = tensors_in(call(model, inputs))
        return [out * 1 for out in outputs if out.requires_grad]

    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return graph.build_dependency(model, example_inputs, forward_fn=forward, verbose=False)
