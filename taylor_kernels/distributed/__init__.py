"""Several processes, one result: scores and masks that are the same bits on every rank."""

from taylor_kernels.distributed.joining import Joining
from taylor_kernels.distributed.optimizers import carry_state
from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.distributed.wrapping import rewrapped

__all__ = ["Joining", "Ranks", "carry_state", "rewrapped"]
