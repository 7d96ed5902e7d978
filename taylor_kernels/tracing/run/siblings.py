"""Modules of a list that a run has not reached, beside others of it that it has.

Which experts of a mixture see the tokens of an example is chance, and others will see those of
another day. A list of modules that are made alike is run in full therefore: what the run has passed
by is given what the first of its siblings was given, and returns what goes with what that one has
returned. So its channels go with those of the streams around it, and it is no dead end in which
they are missing later. It costs the model nothing: what a run never uses saves no FLOPs as it
shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taylor_kernels.tracing.run.recorder import Recorder


class _Called(NamedTuple):
    """A call of a module: which one, and what it was given and has returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class Siblings:
    """Runs the modules of lists and dictionaries that a run of the model has passed by.

    Args:
        modules: all of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._family: dict[nn.Module, list[nn.Module]] = {}
        for module in modules:
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                alike: dict[object, list[nn.Module]] = {}
                for child in module.children():
                    alike.setdefault(_made(child), []).append(child)
                for family in alike.values():
                    if len(family) > 1 and next(family[0].parameters(), None) is not None:
                        self._family |= dict.fromkeys(family, family)
        self._first: dict[int, _Called] = {}
        self._waiting = {id(family): set(family) for family in self._family.values()}

    def ran(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """A module has run."""
        family = self._family.get(module)
        if family is None:
            return
        waiting = self._waiting[id(family)]
        waiting.discard(module)
        if not waiting:
            self._first.pop(id(family), None)
        elif len(waiting) == len(family) - 1:
            self._first.setdefault(id(family), _Called(module, args, kwargs, output))

    def run_others(self, recorder: Recorder) -> None:
        """The run has come to its end: run what it has passed by."""
        for number, called in list(self._first.items()):
            for module in [m for m in self._family[called.module] if m in self._waiting[number]]:
                products = len(recorder.record.products)
                try:
                    with recorder.record.all_or_nothing(), _beside_the_count(recorder):
                        output = module(*called.args, **called.kwargs)
                except (TimeoutError, MemoryError):
                    raise
                except Exception:  # it wants other inputs, and is as unknown as before
                    continue
                more = recorder.record.products[products:]
                recorder.record.products[products:] = [replace(p, macs=0) for p in more]
                _join(recorder, called.output, output)
        self._first.clear()


def _beside_the_count(recorder: Recorder) -> AbstractContextManager[None]:
    """Inside, no operation counts as the model's; in train mode they are not counted anyway, and
    those that draw numbers are to be seen."""
    return recorder.uncounted() if recorder.draws is None else nullcontext()


def _made(module: nn.Module) -> object:
    """What modules have in common that are made alike."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in module.named_parameters()]
    return type(module), tuple(shapes)


def _join(recorder: Recorder, one: Any, other: Any) -> None:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=False)
    for mine, its in pairs:
        if isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.shape == its.shape:
            ours, theirs = recorder.labels(mine).dims, recorder.labels(its).dims
            for vector, vector_of_other in zip(ours, theirs, strict=True):
                recorder.record.join(vector, vector_of_other, (recorder.module, "siblings"))
