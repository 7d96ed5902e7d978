"""What functional.linear is given and returns where it multiplies by a weight that no hook sees.

nn.MultiheadAttention hands the weight of its `out_proj` to a function and never calls the layer, so
that no module is given the context vector. While such a module runs, a mode of PyTorch's looks at
the functions that it calls; all of them compute what they would.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from taylor_kernels.hooks import Hook, hide_from_compiler

#: Makes another tensor of one, or None to leave it.
Change = Callable[[Tensor], Tensor | None]
#: (name of the parameter, whether it is what the product is given) -> what is put in its place.
Changes = Mapping[tuple[str, bool], Change]
#: How many examples there are where an attention has made [positions · examples, channels] of them.
_EXAMPLES: ContextVar[int | None] = ContextVar("examples", default=None)


class Products:
    """Puts other tensors in place of what products with parameters are given, or return.

    They are handed over with the channels in the last dimension. What an attention gives its last
    product has the examples in dimension 0, whatever comes first outside; what it returns has there
    what its result has, since other layers add to that.

    Args:
        changes: of parameters by name, each of which one product uses alone.
    """

    def __init__(self, model: nn.Module, changes: Changes) -> None:
        self.model, self._changes = model, changes
        self._names = dict.fromkeys(name for name, _ in changes)
        self._running: dict[int, list[_Mode | None]] = {}  # by thread, as PyTorch's modes are

    @property
    def running(self) -> list[_Mode | None]:
        """The runs of this thread, the innermost last."""
        return self._running.setdefault(threading.get_ident(), [])

    def put_on(self, module: nn.Module, *, scored: bool) -> list[RemovableHandle]:
        """Watch while a module runs.

        Args:
            scored: only where a graph is recorded; without one PyTorch may run an attention in one
                piece, which it would not while it is watched. The hooks stay with their module
                then, as a `Hook` does, and keep nothing alive.
        """
        begin: Any = Hook(self._begin_scored) if scored else self._begin
        end: Any = Hook(self._end) if scored else self._end
        # Before and behind the hooks of others, whose functions are none of the module's.
        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, prepend=True, always_call=True),
        ]

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        positions_first = None
        if isinstance(module, nn.MultiheadAttention):
            query = args[0] if args else kwargs["query"]
            positions_first = not module.batch_first or query.dim() == 2
        mode = _Mode(self, positions_first)
        mode.__enter__()
        self.running.append(mode)

    def _begin_scored(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._begin(module, args, kwargs)
        else:
            self.running.append(None)

    def _end(self, *_: object) -> None:
        # None is running where a hook of others has failed before the module ran.
        mode = self.running.pop() if self.running else None
        if not self.running:
            del self._running[threading.get_ident()]
        if mode is not None:
            mode.__exit__(None, None, None)

    def linear(
        self, mode: _Mode, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """functional.linear, in a run."""
        for name in self._names:
            owner, _, leaf = name.rpartition(".")
            if weight is getattr(self.model.get_submodule(owner), leaf):
                input = self._changed(mode, (name, True), input)
                return self._changed(mode, (name, False), functional.linear(input, weight, bias))
        return functional.linear(input, weight, bias)

    def _changed(self, mode: _Mode, place: tuple[str, bool], tensor: Tensor) -> Tensor:
        change, examples = self._changes.get(place), _EXAMPLES.get()
        if change is None or examples == 0:
            return tensor
        shown = tensor if examples is None else tensor.unflatten(0, (-1, examples))
        # The function has positions first, PrunedMultiheadAttention examples.
        have = examples is not None
        outside = have if mode.positions_first is None else mode.positions_first
        turned = have != (outside and not place[1])
        new = change(shown.transpose(0, 1) if turned else shown)
        if new is None:
            return tensor
        new = new.transpose(0, 1) if turned else new
        return new if examples is None else new.flatten(0, 1)


class _Mode(TorchFunctionMode):
    """A run of a module.

    Args:
        positions_first: an attention's result has positions in dimension 0, not examples; None of
            other modules, which leave what they are given as it is.
    """

    def __init__(self, products: Products, positions_first: bool | None) -> None:
        super().__init__()
        self.positions_first = positions_first
        self._products = weakref.ref(products)  # one that is left behind keeps no model alive

    def left_by(self, model: nn.Module) -> bool:
        """Whether it is a run of a module of this model, or of one whose meter is gone."""
        products = self._products()
        return products is None or products.model is model

    def leave(self) -> None:
        if (products := self._products()) is not None:
            products.running.clear()
        self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        products = self._products()
        # One that an interrupted run has left behind sees the products of later ones.
        if products is not None and products.running[-1:] == [self]:
            if func is functional.linear:
                return products.linear(self, *args, **kwargs)
            if func is functional.multi_head_attention_forward:
                return _attention(partial(products.linear, self), *args, **kwargs)
        return func(*args, **kwargs)


hide_from_compiler(_Mode.__torch_function__)


def leave_interrupted(model: nn.Module) -> None:
    """Take off what runs of a model have left behind.

    After a KeyboardInterrupt PyTorch calls no hook. To be called where the whole
    model begins to run, so that no module of it is running.
    """
    modes = _get_current_function_mode_stack()
    while modes and isinstance(mode := modes.pop(), _Mode) and mode.left_by(model):
        mode.leave()


def _attention(linear: Callable[..., Tensor], query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """functional.multi_head_attention_forward, whose last product is by another function.

    It is the same code, and so the same operations: only the names `linear`, which the code itself
    calls for nothing else, and `has_torch_function`, by which it would hand itself to the mode once
    more, stand for others.
    """
    whole = functional.multi_head_attention_forward
    names = {
        **whole.__globals__,
        "linear": linear,
        "has_torch_function": lambda _: False,
    }
    same = types.FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__)
    same.__kwdefaults__ = whole.__kwdefaults__
    before = _EXAMPLES.set(query.size(1) if query.dim() == 3 else 1)
    try:
        return same(query, *args, **kwargs)
    finally:
        _EXAMPLES.reset(before)
