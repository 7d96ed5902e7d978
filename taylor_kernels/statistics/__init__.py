"""Statistics: what criteria are computed from. One table per layer, a row per filter.

A statistic is a class that `register_statistic` has been given; its attributes say what it reads
of a pass and what its columns are (`Statistic`). Importing this package registers its own.
"""

from taylor_kernels.statistics.base import (
    Closure,
    Reads,
    Statistic,
    check_closure,
    check_loss_scale,
    check_no_noise,
    check_streams,
    check_weight,
    checked_tables,
)
from taylor_kernels.statistics.bn_scale import BatchNormScale
from taylor_kernels.statistics.fisher import Fisher, FisherProbe
from taylor_kernels.statistics.gate_curvature import ExactGateCurvature, GateCurvature
from taylor_kernels.statistics.gate_products import GateProducts
from taylor_kernels.statistics.gates import ExampleGates
from taylor_kernels.statistics.layers import (
    Layers,
    filter_count,
    find_layers,
    held_weight,
    is_computed,
    is_frozen,
    is_layer,
)
from taylor_kernels.statistics.loss_change import LossChange
from taylor_kernels.statistics.minibatch_gates import Gates
from taylor_kernels.statistics.parameters import Magnitudes, WeightMoments
from taylor_kernels.statistics.parts import BareLayer, bare_layer, parts_beside_layers
from taylor_kernels.statistics.random_draw import Random
from taylor_kernels.statistics.registry import (
    get_statistic,
    register_statistic,
    statistic_names,
    statistics_table,
)
from taylor_kernels.statistics.weight_products import Hutchinson, SecondOrder

__all__ = [
    "BareLayer",
    "BatchNormScale",
    "Closure",
    "ExactGateCurvature",
    "ExampleGates",
    "Fisher",
    "FisherProbe",
    "GateCurvature",
    "GateProducts",
    "Gates",
    "Hutchinson",
    "Layers",
    "LossChange",
    "Magnitudes",
    "Random",
    "Reads",
    "SecondOrder",
    "Statistic",
    "WeightMoments",
    "bare_layer",
    "check_closure",
    "check_loss_scale",
    "check_no_noise",
    "check_streams",
    "check_weight",
    "checked_tables",
    "filter_count",
    "find_layers",
    "get_statistic",
    "held_weight",
    "is_computed",
    "is_frozen",
    "is_layer",
    "parts_beside_layers",
    "register_statistic",
    "statistic_names",
    "statistics_table",
]

__doc__ += f"\n{statistics_table()}\n"
