"""What every source is: a meter on some layers of a model that hands over one table per layer."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

#: A layer whose filters can be scored.
Layer = _ConvNd | nn.Linear
Layers = dict[str, Layer]
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
        self.updates = 0  # collect() so far: seeds what a source draws at random

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


def find_layers(model: nn.Module, names: Sequence[str] | None, *, trainable_only: bool) -> Layers:
    """The convolution and linear layers of a model by name: all, or those that `names` match.

    Args:
        names: module names; * and ? match as in file names.
        trainable_only: leave layers with a frozen weight out (with a warning).

    Raises:
        ValueError: a name matches no such layer; a named layer is frozen though
            `trainable_only`; nothing is left.
    """
    candidates: Layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    if names is None:
        chosen = candidates
    else:
        if isinstance(names, str):
            raise ValueError(f"layers: expected a sequence of names, got the string {names!r}")
        chosen = {}
        for pattern in names:
            matches = {n: m for n, m in candidates.items() if fnmatchcase(n, pattern)}
            if not matches:
                raise ValueError(
                    f"layers: {pattern!r} matches no convolution or linear layer; "
                    f"there are {', '.join(candidates) or 'none'}"
                )
            chosen |= matches
    frozen = [n for n, m in chosen.items() if not m.weight.requires_grad] if trainable_only else []
    if frozen and names is not None:
        raise ValueError(
            f"layers: {', '.join(frozen)} have frozen weights, so this criterion has nothing to "
            "read; unfreeze them or use taylor_fo_gate, which needs no weight gradient"
        )
    if frozen:
        warnings.warn(
            f"{len(frozen)} layers with frozen weights are left out: {', '.join(frozen)}; "
            "taylor_fo_gate can score them",
            stacklevel=3,
        )
    if names is not None and not chosen:
        raise ValueError("layers: is empty; name a layer, or pass None for all")
    for name, layer in chosen.items():
        if isinstance(layer.weight, UninitializedParameter) or layer.weight.is_meta:
            raise ValueError(
                f"model: {name} has no values yet (a lazy module, or the meta device); run the "
                "model once, or move it to a real device first"
            )
    chosen = {n: m for n, m in chosen.items() if n not in frozen}
    if not chosen:
        raise ValueError(
            "model: has no convolution or linear layer"
            + (" with a trainable weight" if frozen else "")
            + ", so there is nothing to score"
        )
    return chosen


def filter_axis(layer: Layer) -> int:
    """The dimension of the weight that counts output filters: 1 for transposed convolutions."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def channel_dim(layer: Layer) -> int:
    """The dimension of the layer's output that counts filters, from the end: batch or no batch."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; those of tensors of torch.inference_mode() are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def filter_count(layer: Layer) -> int:
    """How many output filters, or neurons, a layer has."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


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
