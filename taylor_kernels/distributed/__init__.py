"""Several processes, one result: scores and masks that are the same bits on every rank."""

from taylor_kernels.distributed.ranks import Ranks

__all__ = ["Ranks"]
