"""Taylor importance of filters, in fused kernels, and pruning with it."""

from taylor_kernels.backends import available as backends
from taylor_kernels.ops.filter_moments import MOMENTS, filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients

__all__ = ["MOMENTS", "backends", "filter_moments", "gate_gradients"]
