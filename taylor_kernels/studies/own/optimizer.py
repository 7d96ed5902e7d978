"""The optimizer of a run of `prune`: momentum SGD, or what --optimizer names."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.optim import Optimizer

from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.paths import find, naming
from taylor_kernels.studies.own.settings import PruneSettings
from taylor_kernels.studies.training import sgd

_LR, _WEIGHT_DECAY = 0.01, 5e-4


def users_optimizer(model: nn.Module, settings: PruneSettings) -> Optimizer:
    """Momentum SGD, or what --optimizer names: a class gets the parameters, a function the model.

    Raises:
        Mistake: it makes no optimizer, or raises.
    """
    if settings.optimizer is None:
        return sgd(model, settings.lr or _LR, _WEIGHT_DECAY)
    path = settings.optimizer
    make = find("--optimizer", path)
    kind = make.func if isinstance(make, partial) else make
    if isinstance(kind, type) and issubclass(kind, Optimizer):
        options: dict[str, float] = {} if settings.lr is None else {"lr": settings.lr}
        with naming(f"--optimizer: {path}(parameters)"):
            return make(model.parameters(), **options)
    if not callable(make):
        raise Mistake(
            f"--optimizer: {path} is a {type(make).__name__}, neither a class of optimizers nor a "
            "function"
        )
    if settings.lr is not None:
        raise Mistake(
            f"--lr: the function {path} makes the whole optimizer of --optimizer; set the learning "
            "rate there"
        )
    with naming(f"--optimizer: {path}(model)"):
        optimizer = make(model)
    if not isinstance(optimizer, Optimizer):
        raise Mistake(
            f"--optimizer: {path}(model) gave a {type(optimizer).__name__}, not a "
            "torch.optim.Optimizer; a function is called with the model"
        )
    return optimizer
