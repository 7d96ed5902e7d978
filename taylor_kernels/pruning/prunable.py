"""What can be pruned in a model and what it costs, worked out on copies of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.pruning.arguments import ignored_modules
from taylor_kernels.pruning.check import unsound
from taylor_kernels.pruning.flops import Meter, count_flops
from taylor_kernels.pruning.groups import find_groups
from taylor_kernels.pruning.model_run import preserved_rng
from taylor_kernels.pruning.units import Group
from taylor_kernels.statistics import filter_count

_NOT_CALLED = (
    "is not called as a module in a forward pass (as inside MultiheadAttention), or not reached on "
    "the example inputs"
)


@dataclass(frozen=True)
class Prunable:
    """A model's groups and costs before anything is pruned.

    Attributes:
        scored: the layers whose statistics make up the scores, in the model's order.
        widths: layers that can be pruned -> filters.
        skipped: layers that cannot -> why.
        structure: the groups in plain Python, to recognise the model by.
    """

    groups: list[Group]
    meter: Meter
    scored: list[str]
    widths: dict[str, int]
    skipped: dict[str, str]
    structure: list[list[list[Any]]]


def find_prunable(
    model: nn.Module,
    example_inputs: Any,
    ignore: Sequence[str | nn.Module],
    *,
    round_to: int,
    min_filters: int,
    trainable_only: bool,
    verify: bool,
) -> Prunable:
    """Find, check and cost the groups. The model itself is not run.

    Raises:
        ValueError: the model does not run on the example inputs, cannot be copied or traced, an
            ignore entry matches nothing, or nothing can be pruned.
    """
    ignored = ignored_modules(model, ignore)
    modules = dict(model.named_modules())
    layers = {n: m for n, m in modules.items() if isinstance(m, (_ConvNd, nn.Linear))}
    frozen = {n for n, m in layers.items() if trainable_only and not m.weight.requires_grad}
    plain = _copied(model)
    with preserved_rng():
        try:
            counted = count_flops(plain, example_inputs)
        except Exception as error:
            raise ValueError(
                "example_inputs: the model does not run on them "
                f"({type(error).__name__}: {error}); pass a tensor, a tuple of arguments or a dict "
                "of keyword arguments on the model's device"
            ) from error
        try:
            groups, skipped = find_groups(
                _copied(model), example_inputs, ignored, frozen, round_to, min_filters
            )
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(
                f"model: Torch-Pruning cannot trace it ({type(error).__name__}: {error})"
            ) from error
        if verify and groups:
            unreached = layers.keys() - counted[0].keys()
            found = unsound(plain, example_inputs, groups, train_too=bool(unreached))
            for number, reason in found.items():
                skipped |= {slot.owner: reason for slot in groups[number].producers}
            groups = [group for number, group in enumerate(groups) if number not in found]
        meter = Meter(plain, counted, groups)
    for name in layers:
        if not any(slot.owner == name for group in groups for slot in group.producers):
            skipped.setdefault(name, _NOT_CALLED)
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        reasons = reasons or "no convolution or linear layer"
        raise ValueError(f"model: has nothing to prune ({reasons})")

    owners = {slot.owner for group in groups for slot in group.producers}
    return Prunable(
        groups=groups,
        meter=meter,
        scored=[name for name in layers if name in owners and name not in frozen],
        widths={name: filter_count(layers[name]) for name in layers if name in owners},
        skipped={name: skipped[name] for name in layers if name in skipped and name not in owners},
        structure=[
            [[slot.owner, slot.side, *slot.index.shape] for slot in group.slots] for group in groups
        ],
    )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(
            f"model: it cannot be copied to trace it ({type(error).__name__}: {error}); drop "
            "tensors that hold a graph from its attributes"
        ) from error
