"""Layers that a criterion cannot score: their filters stay, and the reason is told."""

from __future__ import annotations

from torch import nn

from taylor_kernels.gate_sites import find_gate_sites
from taylor_kernels.statistics import BareLayer, Layers, Statistic, is_computed, is_frozen
from taylor_kernels.statistics.layers import Layer, held_weight
from taylor_kernels.tracing import Channels

_BARE = (
    "it is a weight that no layer holds, so this criterion cannot see what it makes; taylor_fo "
    "reads weights alone"
)
_COMPLEX = (
    "its weights are complex, and this criterion is of real ones; magnitude_l2 reads how large "
    "complex ones are"
)
_OUTSIDE = (
    "its weight is used by {!r}, which does not call it, so this criterion cannot see its output; "
    "taylor_fo reads weights alone"
)


def unscored_layers(
    layers: Layers, channels: Channels, model: nn.Module, statistic: type[Statistic] | None
) -> dict[str, str]:
    """Layers that a criterion cannot score -> why.

    Args:
        statistic: what the criterion is computed from; None where no layer is scored, so that only
            weights that no layer holds stay.
    """
    if statistic is None:
        return {name: _BARE for name, layer in layers.items() if isinstance(layer, BareLayer)}
    reads = statistic.reads
    hidden = _hidden(layers, channels, model, statistic) if statistic.at_gates else {}
    found: dict[str, str] = {}
    for name, layer in layers.items():
        computed = is_computed(layer)
        if computed and reads in ("weight gradients", "closure"):
            found[name] = "its weight is computed from other parameters and holds no gradient"
        elif reads == "weight gradients" and is_frozen(layer):
            found[name] = "its weights are frozen and this criterion reads their gradients"
        elif reads != "weights" and _is_complex(layer, statistic):
            found[name] = _COMPLEX
        elif statistic.at_gates:
            if name in hidden:
                found[name] = hidden[name]
        elif isinstance(layer, BareLayer):
            if not statistic.reads_bare:
                found[name] = _BARE
        elif name in channels.outside and reads not in ("weights", "weight gradients"):
            found[name] = _OUTSIDE.format(channels.outside[name] or "the model")
    return found


def _is_complex(layer: Layer, statistic: type[Statistic]) -> bool:
    """Whether what the statistic reads of a layer is complex; what code makes of a weight that no
    layer holds may be real behind it."""
    if isinstance(layer, BareLayer):
        return not statistic.at_gates and any(p.parameter.is_complex() for p in layer.parts)
    return held_weight(layer).is_complex()


def _hidden(
    layers: Layers, channels: Channels, model: nn.Module, statistic: type[Statistic]
) -> dict[str, str]:
    """Layers whose gates stand nowhere -> why."""
    sites = find_gate_sites(channels, model, layers, gradients=statistic.gradient_sites)
    hidden = [name for name in sites.unplaced if name in channels.layers]
    if not hidden:
        return {}
    over_minibatches = find_gate_sites(channels, model, layers, gradients=True).unplaced
    found = {}
    for name in hidden:
        if name not in over_minibatches:
            found[name] = (
                "of its gates only the slope over a minibatch can be had, from the gradient of a "
                "weight, which taylor_fo_bn reads; taylor_fo reads weights alone"
            )
        elif name in channels.outside:
            found[name] = _OUTSIDE.format(channels.outside[name] or "the model")
        elif isinstance(layers[name], BareLayer):
            found[name] = _BARE
        else:
            found[name] = (
                "no module is given or returns its channels, so that no gate can stand there; "
                "taylor_fo reads weights alone"
            )
    return found
