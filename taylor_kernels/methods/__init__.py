"""Methods that compress a model by other means than the pruner, a file each.

Each is an object with the verbs of PyTorch's optimizers or of the pruner, `state_dict` included.
`taylor_kernels.methods` hands on their names.
"""

from taylor_kernels.methods.adaptive import AdaptivePruner
from taylor_kernels.methods.filter_gsm import FilterGSM
from taylor_kernels.methods.frame import FRAMES, Frame
from taylor_kernels.methods.gsm import GSM
from taylor_kernels.methods.lowered import LoweredConv, LoweredLinear, lower_columns
from taylor_kernels.methods.mirror_descent import MirrorDescent
from taylor_kernels.methods.mirror_settings import parameter_groups
from taylor_kernels.methods.mirror_values import Quantized
from taylor_kernels.methods.packed import load_packed
from taylor_kernels.methods.pruning_at_init import at_init
from taylor_kernels.methods.spp import SPP
from taylor_kernels.methods.unread import remove_unread

__all__ = [
    "FRAMES",
    "GSM",
    "SPP",
    "AdaptivePruner",
    "FilterGSM",
    "Frame",
    "LoweredConv",
    "LoweredLinear",
    "MirrorDescent",
    "Quantized",
    "at_init",
    "load_packed",
    "lower_columns",
    "parameter_groups",
    "remove_unread",
]
