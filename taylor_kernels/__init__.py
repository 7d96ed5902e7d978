"""Taylor importance of filters, in fused kernels, and pruning with it.

Two ways in: `Pruner` prunes a model inside its training loop; `Importance` scores its filters.
Both stand on the ops `filter_moments` and `gate_gradients`.
"""

from taylor_kernels import distributed as distributed
from taylor_kernels import methods as methods
from taylor_kernels.backends import available_backends
from taylor_kernels.criteria import Criterion, criterion_names, register_criterion
from taylor_kernels.importance import Importance
from taylor_kernels.labels import draw_labels
from taylor_kernels.mixed_precision import gradient_underflow
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher, linear_fisher
from taylor_kernels.ops.example_norms import (
    conv1d_example_norms,
    conv2d_example_norms,
    conv3d_example_norms,
    linear_example_norms,
)
from taylor_kernels.ops.filter_moments import MOMENTS, filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.ops.hutchinson_moments import hutchinson_moments
from taylor_kernels.ops.rademacher import rademacher_like
from taylor_kernels.ops.second_order_moments import second_order_moments
from taylor_kernels.parameter_fisher import ParameterFisher
from taylor_kernels.pruning import (
    Pruner,
    cut_copy,
    load_checkpoint,
    load_pruned,
    load_sharded_checkpoint,
    read_sharded_checkpoint,
    save_checkpoint,
    save_pruned,
    save_sharded_checkpoint,
    update_config,
)
from taylor_kernels.statistics import Statistic, register_statistic, statistic_names
from taylor_kernels.statistics.activation_gradients import scoring
from taylor_kernels.tracing import Channels, trace

__version__ = "0.1.0"

__all__ = [
    "MOMENTS",
    "Channels",
    "Criterion",
    "Importance",
    "ParameterFisher",
    "Pruner",
    "Statistic",
    "available_backends",
    "conv1d_example_norms",
    "conv2d_example_norms",
    "conv2d_fisher",
    "conv3d_example_norms",
    "criterion_names",
    "cut_copy",
    "draw_labels",
    "filter_moments",
    "gate_gradients",
    "gradient_underflow",
    "hutchinson_moments",
    "linear_example_norms",
    "linear_fisher",
    "load_checkpoint",
    "load_pruned",
    "load_sharded_checkpoint",
    "rademacher_like",
    "read_sharded_checkpoint",
    "register_criterion",
    "register_statistic",
    "save_checkpoint",
    "save_pruned",
    "save_sharded_checkpoint",
    "scoring",
    "second_order_moments",
    "statistic_names",
    "trace",
    "update_config",
]
