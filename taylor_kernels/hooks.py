"""The hook that this package puts on modules and parameters of a model that is not its own."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

#: An older PyTorch does not say so, and exports hooks as part of the model.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class Hook:
    """A hook that stays with its module.

    It does nothing in a copied or saved model, nothing while the model is traced or exported, and
    nothing once the object is gone whose method it calls. torch.compile does not look into it.

    Args:
        function: called with `arguments` before those of the hook. A bound method's object is not
            kept alive.
    """

    def __init__(self, function: Callable[..., Any] | None = None, *arguments: Any) -> None:
        self._function: Callable[[], Callable[..., Any] | None]
        if inspect.ismethod(function):
            self._function = weakref.WeakMethod(function)
        else:
            self._function = lambda: function
        self._arguments = arguments

    def __call__(self, *arguments: Any) -> Any:
        function = self._function()
        if function is None or torch.jit.is_tracing() or _is_exporting():
            return None
        return function(*self._arguments, *arguments)

    def calls(self, function: Callable[..., Any]) -> bool:
        """Whether this is a hook that calls that function, and no copy of one."""
        return self._function() == function

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()

    @property
    def __name__(self) -> str:
        # Asked for by torch.jit.script, which would compile the hook. An error of this kind is no
        # harm to others that ask.
        raise AttributeError(
            "torch.jit.script cannot compile the hooks that tk.Pruner and tk.Importance put on a "
            "model: close() them first (compact() before, for a pruner). A copy of the model that "
            "was made before has them too, so copy it again"
        )


class OnModel:
    """What holds on to a model by its hooks, and so has no copy."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a tk.{type(self).__name__} has hooks on its model and cannot be copied or saved as a "
            "whole: keep its state_dict(), which load_state_dict() of a new one takes. Where the "
            "model holds it as an attribute, delete that before the model is copied or saved"
        )


def hide_from_compiler(function: Any) -> None:
    """Let torch.compile break its graph at a function, and run all of it as it is.

    torch.compiler.disable does that, but takes a second to import, also for those who do not
    compile. An older PyTorch has no such door; there the hooks are compiled too, again and again.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy") and hasattr(frames, "_FrameExecStrategy"):
        skip = frames._FrameAction.SKIP
        strategy = frames._FrameExecStrategy(skip, skip)  # it and what it calls
        frames.set_code_exec_strategy(function.__code__, strategy)
        function._torchdynamo_disable = True
        function._torchdynamo_disable_msg = "a hook of tk.Pruner or tk.Importance; close() it first"


hide_from_compiler(Hook.__call__)


class ShortHook(Hook):
    """A hook that has a short way in most cases.

    Attributes:
        short: called with what the hook is called with; whether that was all. None at first.
    """

    short: Callable[..., bool] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.short is not None and self.short(*arguments):
            return None
        return super().__call__(*arguments)


hide_from_compiler(ShortHook.__call__)


def forget_compiled() -> None:
    """Let all that torch.compile has compiled be compiled anew, since hooks have come or gone.

    It does not look whether a module's hooks are those that it has compiled, and what runs the
    module may be compiled in any function.
    """
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes a second
        torch.compiler.reset()


def remove_all(handles: Sequence[RemovableHandle]) -> None:
    """Take hooks off; those that are off already do not matter."""
    for handle in handles:
        handle.remove()
