"""Methods that compress a model by other means than the pruner, a file each.

Each is an object with the verbs of PyTorch's optimizers or of the pruner, `state_dict` included.
`taylor_kernels.methods` hands on their names.
"""

from taylor_kernels.methods.frame import FRAMES, Frame
from taylor_kernels.methods.gsm import GSM
from taylor_kernels.methods.pruning_at_init import at_init

__all__ = ["FRAMES", "GSM", "Frame", "at_init"]
