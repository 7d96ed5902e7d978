"""The kernels in Triton, for GPUs where the native module was built without CUDA.

Same arguments as `backends/native.py`. With TRITON_INTERPRET=1 in the environment before Triton is
imported, they run on CPU tensors, slowly.
"""

from collections.abc import Callable
from functools import partial

from taylor_kernels.backends.triton import moments_launch
from taylor_kernels.backends.triton.conv2d_fisher import conv2d_example_norms, conv2d_fisher
from taylor_kernels.backends.triton.gate_gradients import gate_gradients
from taylor_kernels.backends.triton.global_threshold import global_threshold
from taylor_kernels.backends.triton.mirror_step import mirror_step
from taylor_kernels.backends.triton.moments import PARAMETER_OPS
from taylor_kernels.backends.triton.rademacher import rademacher
from taylor_kernels.backends.triton.sparse_momentum import sparse_momentum

__all__ = [
    "conv2d_example_norms",
    "conv2d_fisher",
    "gate_gradients",
    "global_threshold",
    "mirror_step",
    "rademacher",
    "sparse_momentum",
]


def __getattr__(op: str) -> Callable[..., None]:
    """An op over a list of parameters, by its name."""
    if op not in PARAMETER_OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {op!r}")
    return partial(moments_launch.run, op)
