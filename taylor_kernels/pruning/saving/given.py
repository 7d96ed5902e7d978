"""What a checkpoint is given: a model, the optimizers that train it, and the pruner of both."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from taylor_kernels.checks import check_module
from taylor_kernels.pruning.pruner import Pruner
from taylor_kernels.pruning.removing.optimizer_state import as_list, check_optimizer_types


def bare(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel wraps, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_given(model: object, optimizer: object, pruner: object) -> None:
    """They are a module, optimizers, and the pruner of that module.

    Raises:
        TypeError: one is something else.
        ValueError: the pruner is of another module.
    """
    check_module(model)
    check_optimizer_types(optimizer)
    if pruner is None:
        return
    if not isinstance(pruner, Pruner):
        raise TypeError(f"pruner: expected a tk.Pruner, got {type(pruner).__name__}")
    if pruner.model is not model:
        raise ValueError(
            "pruner: it prunes another model than the one given; give the one that it was made of "
            "(torch.compile's wrapper has it as ._orig_mod, DataParallel as .module)"
        )


def check_belongs(optimizer: object, pruner: Pruner | None) -> None:
    """The pruner is of these optimizers.

    Raises:
        ValueError: it is not.
    """
    if pruner is None:
        return
    known = list(map(id, as_list(pruner.optimizer)))
    if optimizer is not None and known != list(map(id, as_list(optimizer))):
        raise ValueError(
            "optimizer: the pruner has another one or none, so this one would keep parameters "
            "that the model drops; build the pruner with Pruner(optimizer=...)"
        )
