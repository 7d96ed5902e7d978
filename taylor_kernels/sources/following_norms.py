"""Which BatchNorm follows which layer: watched in the forward pass, where it is a fact.

A norm follows a layer if it is handed the very tensor that the layer returned. No trace of the
model is needed, so any Python in its forward() is fine, and a layer used twice may have two norms.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taylor_kernels.sources.base import Hook, Layers, Source

OnOutput = Callable[[str, Tensor], None]
OnNorm = Callable[[str, _BatchNorm, Tensor, Tensor], None]


class FollowingNorms:
    """Keeps, for every layer, the BatchNorm modules seen behind it, in order of first sight.

    Args:
        on_output: called with (layer name, output) after every forward of a layer.
        on_norm: called with (layer name, norm, its input, its output) after every forward of a
            norm that follows a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        on_output: OnOutput | None = None,
        on_norm: OnNorm | None = None,
    ) -> None:
        self._following: dict[str, list[_BatchNorm]] = {name: [] for name in layers}
        self._producers: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._on_output = on_output
        self._on_norm = on_norm
        self._handles = [
            layer.register_forward_hook(Hook(self._layer_hook(name)))
            for name, layer in layers.items()
        ]
        self._handles += [
            module.register_forward_hook(Hook(self._norm_hook))
            for module in model.modules()
            if isinstance(module, _BatchNorm)
        ]

    def of(self, name: str) -> list[_BatchNorm]:
        """The norms seen to follow the layer of this name so far."""
        return self._following[name]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _layer_hook(self, name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            key = id(output)
            forget = lambda _: self._producers.pop(key, None)  # noqa: E731
            self._producers[key] = (weakref.ref(output, forget), name)
            if self._on_output:
                self._on_output(name, output)

        return hook

    def _norm_hook(self, norm: _BatchNorm, inputs: tuple, output: Tensor) -> None:
        input = inputs[0] if inputs else None
        known = self._producers.get(id(input))
        if known is None or known[0]() is not input or input is None:
            return
        name = known[1]
        if not any(norm is other for other in self._following[name]):
            self._following[name].append(norm)
        if self._on_norm:
            self._on_norm(name, norm, input, output)


class KnowsNorms(Source):
    """A source that needs to know which norm follows which layer, and nothing else of a pass."""

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        super().__init__(model, layers, backend)
        self._norms = FollowingNorms(model, layers)

    def close(self) -> None:
        self._norms.close()
