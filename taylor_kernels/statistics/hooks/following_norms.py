"""Which norm follows which layer: watched in the forward pass, where it is a fact.

A norm follows a layer if it is handed the very tensor that the layer returned, unchanged. No trace
of the model is needed, so any Python in its forward() is fine, and a layer used twice may have two
norms. A norm over another dimension than the layer's channels, as that of tokens behind a linear
layer, does not follow: it has no scale of a channel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.statistics.base import Statistic, version_of
from taylor_kernels.statistics.layers import Layer, Layers, channel_dim, check_output

OnOutput = Callable[[str, Tensor], None]
OnNorm = Callable[[str | None, _NormBase, Tensor, Tensor], None]


class FollowingNorms:
    """Keeps, for every layer, the BatchNorms and InstanceNorms seen behind it, as first seen.

    Args:
        on_output: called with (layer name, output) after every forward of a layer.
        on_norm: called with (layer name or None, norm, its input, its output) after every forward
            of a norm; None if the norm follows no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        on_output: OnOutput | None = None,
        on_norm: OnNorm | None = None,
    ) -> None:
        self._following: dict[str, list[_NormBase]] = {name: [] for name in layers}
        self._producers: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._on_output = None if on_output is None else weakref.WeakMethod(on_output)
        self._on_norm = None if on_norm is None else weakref.WeakMethod(on_norm)
        handles = [
            layer.register_forward_hook(Hook(self._after_layer, name))
            for name, layer in layers.items()
        ]
        handles += [
            module.register_forward_hook(Hook(self._after_norm), with_kwargs=True)
            for module in model.modules()
            if isinstance(module, _NormBase)
        ]
        self.close = weakref.finalize(self, remove_all, handles)

    def of(self, name: str) -> list[_NormBase]:
        """The norms seen to follow the layer of this name so far."""
        return self._following[name]

    def _after_layer(self, name: str, layer: Layer, inputs: tuple, output: object) -> None:
        output = check_output(name, output)
        if output.dim() + channel_dim(layer) == 1:
            key, producers = id(output), self._producers
            known = weakref.ref(output, lambda _: producers.pop(key, None))
            producers[key] = (known, version_of(output), name)
        if self._on_output and (on_output := self._on_output()):
            on_output(name, output)

    def _after_norm(
        self, norm: _NormBase, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        input: Tensor = args[0] if args else kwargs["input"]
        known, version, producer = self._producers.get(id(input), (None, 0, ""))
        # Another version is another tensor: the sum of a residual stream, say, added in place.
        follows = known is not None and known() is input and version == version_of(input)
        name = producer if follows else None
        if name is not None and not any(norm is other for other in self._following[name]):
            self._following[name].append(norm)
        if self._on_norm and (on_norm := self._on_norm()):
            on_norm(name, norm, input, output)


class KnowsNorms(Statistic):
    """A statistic that needs to know which norm follows which layer, and nothing else of a pass."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # Gate sites say it, where they are known.
        self._norms = FollowingNorms(self.model, {} if self.sites is not None else self.layers)

    def close(self) -> None:
        self._norms.close()
