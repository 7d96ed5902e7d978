"""How much layers put out in a run: what is wrong is seen there before something hides it.

Behind a layer comes a ReLU that is zero for all examples, a sigmoid that is one to the last digit,
or a choice that is an integer; the outputs of the model are the same then, whatever has gone wrong
in front of it. A filter that is masked puts out zeros, so that what a layer puts out has the same
norm with it and without it. So has what a product puts out that code makes with a weight by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.hooks import remove_all
from taylor_kernels.pruning.proof.weight_products import WeightProducts
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.notes.experts import is_router


class Norms:
    """The norms of what layers put out in a run.

    Attributes:
        calls: layer -> for each call the sizes of its output without the channels, its type, and
            the norm of all of it that is finite.
        broken: layers that have put out nan or infinity -> whether there was anything else.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[tuple[int, ...], torch.dtype, float]]] = {}
        self.broken: dict[str, bool] = {}
        self._given: dict[str, bool] = {}  # whether it was given anything but zeros

    @property
    def deaf(self) -> frozenset[str]:
        """Layers that were given nothing but zeros, and say nothing of what is in front of them."""
        return frozenset(name for name, anything in self._given.items() if not anything)

    def hear(self, name: str, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook, but for the name of the layer."""
        if not self._given.get(name) and args and isinstance(args[0], Tensor):
            self._given[name] = _wrapped(args[0]) or bool(args[0].any())
        if isinstance(output, Tensor) and not _wrapped(output):
            along = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
            self.add(name, output, (along,))

    def add(self, name: str, output: Tensor, along: tuple[int, ...]) -> None:
        """Write down what a layer has put out, whose channels lie along these dimensions."""
        if not output.is_floating_point():
            return
        # A number of Python's: to ask a tensor takes as long as the norm of a small one.
        norm = torch.linalg.vector_norm(output).item()
        if not math.isfinite(norm):
            finite = output[output.isfinite()]
            self.broken[name] = bool(finite.numel()) and self.broken.get(name, True)
            norm = torch.linalg.vector_norm(finite).item()
        sizes = tuple(n for d, n in enumerate(output.shape) if d - output.dim() not in along)
        self.calls.setdefault(name, []).append((sizes, output.dtype, norm))


def _wrapped(output: Tensor) -> bool:
    """Whether it stands for many, inside of torch.vmap or the like, and has no norm of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(output)


class LayerOutputs:
    """Hears what the layers of a model put out, but for routers, which are run again on some of
    their experts.

    Args:
        modules: dict(model.named_modules()).
        channels: say which weights code uses by itself.
    """

    def __init__(self, modules: Mapping[str, nn.Module], channels: Channels) -> None:
        self._layers = {
            name: module
            for name, module in modules.items()
            if isinstance(module, (nn.Linear, _ConvNd)) and not is_router(module)
        }

        #: The weights that code uses by itself -> the names of their layers.
        self.by_itself: dict[str, str] = {}
        for layer in (*channels.bare, *channels.outside):
            if not (layer in modules and is_router(modules[layer])):
                for weight, _ in channels.weights_of(layer):
                    self.by_itself.setdefault(weight, layer)

    @contextmanager
    def heard(self, weights: Mapping[str, Tensor]) -> Iterator[Norms]:
        """The norms of what layers put out inside, as it comes.

        Args:
            weights: those of `by_itself` that the model has, as they are inside.
        """
        norms = Norms()
        hooks = [
            layer.register_forward_hook(partial(norms.hear, name))
            for name, layer in self._layers.items()
        ]

        def hear(weight: str, output: Tensor, along: tuple[int, ...]) -> None:
            norms.add(self.by_itself[weight], output, along)

        try:
            with WeightProducts(weights, hear) if weights else nullcontext():
                yield norms
        finally:
            remove_all(hooks)


def first_other(
    masked: Norms, removed: Norms, tolerance: Callable[[torch.dtype], float]
) -> str | None:
    """The first layer that puts out more or less in the second run; None if there is none.

    A layer that is not run as often, or on other places (on each head, of which some are gone),
    says nothing.

    Args:
        tolerance: of norms of a type, relative to the greater one.
    """
    for name, before in masked.calls.items():
        after = removed.calls.get(name, [])
        if [call[:2] for call in before] != [call[:2] for call in after]:
            continue
        for (_, dtype, one), (_, _, other) in zip(before, after, strict=True):
            if not math.isclose(one, other, rel_tol=tolerance(dtype)):
                return name
    return None
