"""The kernels in Triton, for GPUs where the native module was built without CUDA.

Same arguments as `backends/native.py`. With TRITON_INTERPRET=1 in the environment before Triton is
imported, they run on CPU tensors, slowly.
"""

from taylor_kernels.backends.triton.conv2d_fisher import conv2d_fisher
from taylor_kernels.backends.triton.gate_gradients import gate_gradients
from taylor_kernels.backends.triton.moments_launch import (
    filter_moments,
    hutchinson_moments,
    second_order_moments,
)
from taylor_kernels.backends.triton.rademacher import rademacher

__all__ = [
    "conv2d_fisher",
    "filter_moments",
    "gate_gradients",
    "hutchinson_moments",
    "rademacher",
    "second_order_moments",
]
