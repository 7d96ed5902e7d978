"""Methods that compress a model by other means than the pruner, a file each.

Each is an object with the verbs of PyTorch's optimizers or of the pruner, `state_dict` included.
`taylor_kernels.methods` hands on their names.
"""

from taylor_kernels.methods.lowered import LoweredConv, LoweredLinear, lower_columns
from taylor_kernels.methods.spp import SPP
from taylor_kernels.methods.unread import remove_unread

__all__ = ["SPP", "LoweredConv", "LoweredLinear", "lower_columns", "remove_unread"]
