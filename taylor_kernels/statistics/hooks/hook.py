"""The hook that all statistics put on a model, and what goes with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class Hook:
    """A hook that stays with its module and does not keep its owner alive.

    In a copied or saved model it does nothing, and so it does once the object is gone whose method
    it calls.

    Args:
        method: a bound method, called with `arguments` before those of the hook.
    """

    def __init__(self, method: Callable[..., Any] | None = None, *arguments: Any) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)
        self._arguments = arguments

    def __call__(self, *arguments: Any) -> Any:
        method = self._method() if self._method is not None else None
        return None if method is None else method(*self._arguments, *arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def remove_all(handles: Sequence[RemovableHandle]) -> None:
    """Take hooks off; those that are off already do not matter."""
    for handle in handles:
        handle.remove()


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; those of tensors of torch.inference_mode() are not counted."""
    return 0 if tensor.is_inference() else tensor._version
