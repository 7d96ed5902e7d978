"""Running a model once and leaving it as it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import random
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from taylor_kernels.tracing.model.caches import plain_tensors


def call(model: nn.Module, example_inputs: Any) -> Any:
    """model(*args) for a tuple or list, model(**kwargs) for a mapping, model(x) for the rest."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested containers, dataclasses and plain objects, each object once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting.extend(reversed(list(item)))
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            fields = dataclasses.fields(item)
            waiting.extend(getattr(item, field.name, None) for field in reversed(fields))
        elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)):
            waiting.extend(vars(item).values())


def example_count(batch: object) -> int:
    """How many examples a minibatch has, by its first tensor; 1 where that does not tell."""
    first = next(tensors_in(batch), None)
    return first.size(0) if first is not None and first.dim() else 1


def tensors_of_modules(
    modules: Mapping[str, nn.Module],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers of a model by their first names, in its order.

    They are those of `named_parameters` and `named_buffers`, which look for all modules again, and
    among the buffers are tensors that are plain attributes of modules (`plain_tensors`).

    Args:
        modules: dict(model.named_modules()).
    """
    tables: list[dict[str, Tensor]] = []
    for kind in ("_parameters", "_buffers"):
        seen: set[int] = set()
        table: dict[str, Tensor] = {}
        for prefix, module in modules.items():
            held = getattr(module, kind)
            if kind == "_buffers" and (plain := plain_tensors(module)):
                held = {**held, **plain}
            for leaf, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    table[f"{prefix}.{leaf}" if prefix else leaf] = tensor
        tables.append(table)
    return tables[0], tables[1]


def is_lazy(tensor: Tensor) -> bool:
    """Whether this is a parameter or buffer of a lazy module that has not run yet."""
    return torch.nn.parameter.is_lazy(tensor)


#: Seconds that a thread waits for the traces and proofs of others, each of which ends by itself:
#: in 300 and 120 seconds, where nobody asks for more.
WAIT = 600.0
_lock = threading.RLock()


def _forked() -> None:
    """The thread that may have held it is not in the child."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside is one thread of the process; it can go in again.

    What exchanges methods of tensors, classes of modules or settings of PyTorch puts back what it
    found: two that overlap would leave what the other one had put there.

    Raises:
        TimeoutError: others have been inside for `WAIT` seconds.
    """
    lock = _lock
    if not lock.acquire(timeout=WAIT):
        raise TimeoutError(
            f"model: other threads have traced or tried theirs for {WAIT:g} seconds, and only one "
            "can at a time; make these traces or pruners one after another, or with smaller "
            "example inputs"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def quiet(modules: Iterable[nn.Module], mode: TorchFunctionMode | None = None) -> Iterator[None]:
    """No gradients, no fused attention fast path, no compilation; random states as they were.

    Compilation and random states are the process's, so that threads wait for each other.

    Args:
        modules: those of what is to be run inside.
        mode: a mode to run it in.

    Raises:
        TimeoutError: others have been inside for `WAIT` seconds.
    """
    with one_at_a_time(), _quiet(modules, mode):
        yield


#: Modules of PyTorch that have a fused path.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


@contextmanager
def _quiet(modules: Iterable[nn.Module], mode: TorchFunctionMode | None) -> Iterator[None]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if mode is None and any(isinstance(module, _FUSED) for module in modules):
        # They leave their fused path under any mode for functions, which is this thread's alone;
        # the setting of `torch.backends.mha` is the process's.
        mode = BaseTorchFunctionMode()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # Weights that autocast has cast before show no labels, and those of a run without gradients
        # would have none in the next one.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []))
        # Code may draw from Python and NumPy too, as data augmentation in a model does.
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        if mode is not None:
            stack.enter_context(mode)
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


#: Whether `new_garbage_only` is in use.
_frozen = False


@contextmanager
def new_garbage_only() -> Iterator[None]:
    """Inside, the collector does not search what was there before.

    Tracing and proving make many small objects, for which it would go through all of a process's
    objects again and again, at a tenth of a second each time.
    """
    global _frozen
    # Asking how many are frozen goes through them all, so that a use inside another one does not.
    if _frozen or gc.get_freeze_count():  # somebody else's, who counts on it
        yield
        return
    gc.freeze()
    _frozen = True
    try:
        yield
    finally:
        _frozen = False
        gc.unfreeze()


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Inside, tensors are made that can be trained on later, whatever mode the caller is in."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def copied(example_inputs: Any) -> Any:
    """Inputs that the model may write into."""

    def copy_one(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    if isinstance(example_inputs, Tensor):
        return copy_one(example_inputs)  # copy.copy of a tensor takes it apart and saves it
    return torch.utils._pytree.tree_map(copy_one, copy.copy(example_inputs))
