"""Iterative pruning over Taylor scores."""

from taylor_kernels.pruning.choosing.flops import Cost
from taylor_kernels.pruning.pruner import Pruner
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.saving.checkpoint import load_checkpoint, save_checkpoint
from taylor_kernels.pruning.saving.configs import update_config
from taylor_kernels.pruning.saving.recipe import cut_copy, load_pruned, save_pruned
from taylor_kernels.pruning.saving.sharded_checkpoint import (
    load_sharded_checkpoint,
    read_sharded_checkpoint,
    save_sharded_checkpoint,
)

__all__ = [
    "Cost",
    "PruneRecord",
    "Pruner",
    "cut_copy",
    "load_checkpoint",
    "load_pruned",
    "load_sharded_checkpoint",
    "read_sharded_checkpoint",
    "save_checkpoint",
    "save_pruned",
    "save_sharded_checkpoint",
    "update_config",
]
