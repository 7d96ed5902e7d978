"""Norms across channels that a module's code calls as functions, while some of these are masked.

`F.layer_norm` and `F.rms_norm` in the code of a block are run on the channels that are kept, as
modules that are such norms are (kept_norms.py). What they are is seen by a mode for functions that
is on while the module runs; it tells calls of the module's own code, by their place in it, from
those of modules in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from taylor_kernels.tracing.model.code import Place, running

#: Function -> the names of its arguments; those from the third on lie along the channels if they
#: are tensors.
_NORMS: dict[Any, list[str]] = {
    function: ["input", "normalized_shape", "weight", *others]
    for functions, others in (
        ((functional.layer_norm, torch.layer_norm), ["bias", "eps", "cudnn_enable"]),
        ((functional.rms_norm, torch.rms_norm), ["eps"]),
    )
    for function in functions
}

#: How many channels a call is given and the places of those that it is run on; None for all.
Call = tuple[int, Tensor] | None


class KeptCalls:
    """A forward hook, also called after an error, that ends what `begin` has begun.

    Args:
        calls: of the norms that the module's code calls, with their places in it. Those at one
            place are in the order of a run.
    """

    def __init__(self, calls: Sequence[tuple[Place, Call]]) -> None:
        self._calls: dict[Place, list[Call]] = {}
        for place, call in calls:
            self._calls.setdefault(place, []).append(call)
        self._on: dict[int, list[_OnKept]] = {}  # of threads

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: norms that code calls from now on are run on what is kept."""
        mode = _OnKept(module, self._calls)
        self._on.setdefault(threading.get_ident(), []).append(mode)
        mode.__enter__()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if modes := self._on.get(threading.get_ident()):
            modes.pop().__exit__(None, None, None)


class _OnKept(TorchFunctionMode):
    """Runs norms that the code of one module calls on the channels that are kept."""

    def __init__(self, module: nn.Module, calls: Mapping[Place, Sequence[Call]]) -> None:
        super().__init__()
        self._module = module
        self._left = {place: iter(here) for place, here in calls.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMS or (code := running()).module is not self._module:
            return func(*args, **kwargs)
        if code.again:
            raise self._error("calls a norm inside of a checkpoint, which would run it unmasked")
        try:
            call = next(self._left[code.place])
        except (KeyError, StopIteration):
            line = f"{code.place[0][0]} " if code.place else ""
            raise self._error(
                f"calls {func.__name__} in line {line}where, or more often than, it does not on "
                "the example inputs"
            ) from None
        if call is None:
            return func(*args, **kwargs)
        given = dict(zip(_NORMS[func], args, strict=False)) | dict(kwargs)
        width, places = call
        whole, shape = given.pop("input"), given.pop("normalized_shape")
        if [*shape] != [width] or whole.size(-1) != width:
            raise self._error(
                f"normalises over {tuple(shape)} and not {width} channels, unlike on the example "
                "inputs"
            )
        places = places.to(whole.device)
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                given[name] = given[name].index_select(0, places)
        found = func(whole.index_select(-1, places), [places.numel()], **given)
        return found.new_zeros(whole.shape).index_copy(-1, places, found)

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"model: the code of a {type(self._module).__name__} some of whose channels are masked "
            f"{what}; compact() first"
        )
