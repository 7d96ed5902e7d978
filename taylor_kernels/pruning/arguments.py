"""The checks on `Pruner`'s arguments that do not need the model to be run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from taylor_kernels.backends import select
from taylor_kernels.checks import check_count, check_flag, check_module, is_number
from taylor_kernels.criteria import Criterion, get_criterion
from taylor_kernels.pruning.masks.masking import check_unmasked
from taylor_kernels.pruning.removing.optimizer_state import (
    as_list,
    check_optimizer_types,
    optimizers_in,
)
from taylor_kernels.shards import is_fsdp
from taylor_kernels.statistics import get_statistic


def one_criterion(
    criterion: str | Criterion | None, importance: str | Criterion | None
) -> Criterion:
    """What was given under the name `criterion`, or under `importance`, its old one."""
    if importance is not None:
        if criterion is not None:
            raise TypeError(
                "importance: is the old name of criterion, which is given too; leave it out"
            )
        warnings.warn(
            "Pruner(importance=...) is deprecated; call it criterion",
            DeprecationWarning,
            stacklevel=3,
        )
        criterion = importance
    return get_criterion("taylor_fo_bn" if criterion is None else criterion)


def check_arguments(
    model: nn.Module,
    criterion: Criterion,
    targets: Mapping[str, object],
    *,
    every: Any,
    per_step: Any,
    momentum: Any,
    round_to: Any,
    min_filters: Any,
    optimizer: Any,
    backend: Any,
    verify: Any = True,
) -> dict[str, float]:
    """The targets that were given, or an error that names the argument."""
    check_module(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: its parameter {name} is on the meta device; materialise it first"
            )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"model: {type(model).__name__} is around it, which does not follow compact(); make "
            "the pruner of its .module"
        )
    if is_fsdp(model):
        raise ValueError(
            "model: fully_shard() has its parameters in parts already, so that it cannot be "
            "traced; make the pruner first, shard the model then, and give the pruner its "
            "optimizer with use_optimizer()"
        )
    check_unmasked(model)
    if not get_statistic(criterion.statistic).prunable:
        raise ValueError(
            f"criterion: {criterion.name!r} says nothing of filters that are removed together; it "
            "is for judging other criteria (tk.Importance). Prune with taylor_fo_bn or "
            "taylor_fo_gate"
        )
    given = {name: _fraction(name, value) for name, value in targets.items() if value is not None}
    if not given:
        raise ValueError(
            "flops, params, filters: none is given; say what fraction to keep, such as flops=0.5"
        )
    for name, value in (("every", every), ("round_to", round_to), ("min_filters", min_filters)):
        check_count(name, value)
    if not (per_step >= 1 if _is_int(per_step) else is_number(per_step) and 0 < per_step < 1):
        raise ValueError(
            f"per_step: expected a count of at least 1 or a fraction in (0, 1), got {per_step!r}"
        )
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
    check_flag("verify", verify)
    if optimizer is not None:
        check_optimizer(optimizer, model)
    kept = next((p for p in model.parameters() if p.is_floating_point()), None)
    if backend is not None and kept is not None:
        select(kept.device, kept.dtype, backend)
    return given


def ignored_modules(model: nn.Module, patterns: Sequence[str | nn.Module]) -> set[str]:
    """The names of the modules that the argument `ignore` names, and of all modules inside them.

    Raises:
        ValueError: an entry matches nothing.
        TypeError: `patterns`, or an entry, is something else.
    """
    if isinstance(patterns, (str, nn.Module)):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable) or isinstance(patterns, Tensor):
        raise TypeError(
            "ignore: expected a sequence of module names, patterns or modules, () for none, got "
            f"{patterns!r}"
        )
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            found = [name for name in names if fnmatchcase(name, pattern)]
        elif isinstance(pattern, nn.Module):
            found = [name for name, module in names.items() if module is pattern]
        else:
            raise TypeError(
                f"ignore: entries are module names, patterns or modules, got {pattern!r}"
            )
        if not found:
            shown = pattern if isinstance(pattern, str) else type(pattern).__name__
            raise ValueError(
                f"ignore: {shown!r} matches no module of the model; there are "
                f"{', '.join(list(names)[:20])}{', ...' if len(names) > 20 else ''}"
            )
        chosen |= {n for n in names if any(n == f or n.startswith(f + ".") for f in found)}
    # A shared module goes by its first name everywhere else.
    first = {module: name for name, module in model.named_modules()}
    return {first[names[name]] for name in chosen}


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """The optimizers train the model, and their state can be cut with it.

    Raises:
        TypeError: one is no optimizer.
        ValueError: one holds no parameter of the model, or a history that cannot be cut.
    """
    given = as_list(optimizer)
    check_optimizer_types(optimizer)
    own = set(model.parameters())

    def holds(one: Optimizer) -> bool:
        return any(p in own for group in one.param_groups for p in group["params"])

    if any(isinstance(one, LBFGS) and holds(one) for one in optimizers_in(optimizer)):
        raise ValueError(
            "optimizer: LBFGS keeps one flat history of all weights, which cannot be cut with the "
            "model; use another one, or leave it out and make a new one after compact()"
        )
    if not given or not all(map(holds, given)):
        raise ValueError(
            "optimizer: it holds no parameter of the model; build it from model.parameters()"
        )


def _fraction(name: str, value: Any) -> float:
    if not is_number(value) or not 0 < value <= 1:
        percent = is_number(value) and 1 < value <= 100
        hint = f"; for {value:g}% write {value / 100:g}" if percent else ""
        raise ValueError(f"{name}: expected the fraction to keep, in (0, 1], got {value!r}{hint}")
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
