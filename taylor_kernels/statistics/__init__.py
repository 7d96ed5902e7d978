"""Sources: where a criterion's raw statistics come from. One table per layer, a row per filter.

| source | columns of a layer's table |
|---|---|
| moments | the five of `MOMENTS`, from weight and gradient |
| gates | 1: the gate's gradient over the minibatch |
| example_gates | N: the gate's gradient for each example |
| gate_curvature | 1 + n: the gate's gradient; numbers whose squares sum to its curvature |
| weight_products | 2: Σ q, Σ q² with q = g·w − ½·w·(HW), W all scored weights |
| hutchinson | 1: Σ w² z (Hz), random signs z drawn anew at every update |
| fisher | 1: Σ w² · mean over examples of g², each of its own loss |
| fisher_probe | 1: the same, of a random square root of the loss's curvature at the output |
| gate_products | 1: s − ½ H1 of all gates: their gradient, their Hessian's row sums |
| magnitudes | 2: Σ abs(w), Σ w² |
| bn_scale | 1: abs(γ) of the BatchNorm that follows, nan without one |
| random | 1: uniform in [0, 1), drawn once |
| loss_change | 1: loss without the filter − loss with it |

`loss_change` says nothing of filters removed together, so the pruner cannot use it.
"""

from __future__ import annotations

from torch import nn

from taylor_kernels.statistics.base import Closure, Source, check_closure
from taylor_kernels.statistics.fisher import Fisher, FisherProbe
from taylor_kernels.statistics.gate_curvature import GateCurvature
from taylor_kernels.statistics.gate_products import GateProducts
from taylor_kernels.statistics.gates import ExampleGates, Gates
from taylor_kernels.statistics.layers import Layers, filter_count, find_layers
from taylor_kernels.statistics.loss_change import LossChange
from taylor_kernels.statistics.parameters import BatchNormScale, Magnitudes, Random, WeightMoments
from taylor_kernels.statistics.weight_products import Hutchinson, SecondOrder

__all__ = [
    "Closure",
    "Source",
    "check_closure",
    "filter_count",
    "find_layers",
    "make_source",
    "needs_closure",
    "reads_weight_gradients",
]

_CLASSES: dict[str, type[Source]] = {
    "moments": WeightMoments,
    "gates": Gates,
    "example_gates": ExampleGates,
    "gate_curvature": GateCurvature,
    "weight_products": SecondOrder,
    "hutchinson": Hutchinson,
    "fisher": Fisher,
    "fisher_probe": FisherProbe,
    "gate_products": GateProducts,
    "magnitudes": Magnitudes,
    "bn_scale": BatchNormScale,
    "random": Random,
    "loss_change": LossChange,
}


def make_source(name: str, model: nn.Module, layers: Layers, backend: str | None = None) -> Source:
    """The source of that name (one of `criteria.SOURCES`), watching `layers` from now on."""
    return _CLASSES[name](model, layers, backend)


def reads_weight_gradients(name: str) -> bool:
    """Whether that source has nothing to read in a layer whose weight is frozen."""
    return _CLASSES[name].needs_weight_grad


def needs_closure(name: str) -> bool:
    """Whether that source runs the model itself, through a closure."""
    return _CLASSES[name].needs_closure
