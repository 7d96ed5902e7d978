"""What every source is: a meter on some layers of a model that hands over one table per layer."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taylor_kernels.statistics.layers import Layers

#: Runs the model and returns the loss, a scalar.
Closure = Callable[[], Tensor]


class Source(ABC):
    """A meter on `layers` (name -> convolution or linear module) of `model`."""

    #: Layers whose weight is frozen cannot be read by this source.
    needs_weight_grad = False
    #: collect() runs the model itself, through a closure; otherwise it takes none.
    needs_closure = False

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        self.model = model
        self.layers = layers
        self.backend = backend
        self.updates = 0  # how often collect() drew something at random: the seed of the next

    @abstractmethod
    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        """The tables of all layers since the last call, [F, K] each, in the order of `layers`.

        Args:
            loss_scale: what the loss was multiplied by before backward(); divided out. A closure's
                loss is taken as it is.
            closure: computes the loss of the model as it stands; given if `needs_closure`.
        """

    def discard(self) -> None:  # noqa: B027 - most sources gather nothing between updates
        """Forget what was gathered since the last collect()."""

    def close(self) -> None:  # noqa: B027 - and put no hook on the model
        """Take every hook off the model."""


def check_closure(source: Source, closure: object, criterion: str, method: str) -> None:
    """A closure is there where the criterion's source needs one, and nowhere else.

    Raises:
        ValueError, TypeError: it is not so; `method` is what was called.
    """
    if source.needs_closure and closure is None:
        raise ValueError(
            f"closure: {criterion!r} runs the model itself; call "
            f"{method}(closure=lambda: loss_fn(model(x), y))"
        )
    if closure is not None and not source.needs_closure:
        raise ValueError(
            f"closure: {criterion!r} takes none, it reads what loss.backward() has left; call "
            f"{method}() without"
        )
    if closure is not None and not callable(closure):
        raise TypeError(f"closure: expected a function, got {type(closure).__name__}")


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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; then each in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
