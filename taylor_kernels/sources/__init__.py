"""Sources: where a criterion's raw statistics come from. One table per layer, a row per filter.

| source | columns of a layer's table |
|---|---|
| moments | the five of `MOMENTS`, from weight and gradient |
| gates | 1: the gate's gradient over the minibatch |
| example_gates | N: the gate's gradient for each example |
| magnitudes | 2: Σ abs(w), Σ w² |
| bn_scale | 1: abs(γ) of the BatchNorm that follows, nan without one |
| random | 1: uniform in [0, 1), drawn once |
| loss_change | 1: loss without the filter − loss with it |

`loss_change` says nothing of filters removed together, so the pruner cannot use it.
"""

from __future__ import annotations

from torch import nn

from taylor_kernels.sources.base import Layers, Source, filter_count, find_layers
from taylor_kernels.sources.gates import ExampleGates, Gates
from taylor_kernels.sources.loss_change import LossChange
from taylor_kernels.sources.parameters import BatchNormScale, Magnitudes, Random, WeightMoments

__all__ = ["Source", "filter_count", "find_layers", "make_source"]

_CLASSES: dict[str, type[Source]] = {
    "moments": WeightMoments,
    "gates": Gates,
    "example_gates": ExampleGates,
    "magnitudes": Magnitudes,
    "bn_scale": BatchNormScale,
    "random": Random,
    "loss_change": LossChange,
}


def make_source(name: str, model: nn.Module, layers: Layers, backend: str | None = None) -> Source:
    """The source of that name (one of `criteria.SOURCES`), watching `layers` from now on."""
    return _CLASSES[name](model, layers, backend)
