"""What a model costs as units go: filters, parameters and FLOPs, exact and without running it.

Every cost is a sum over parameter tensors of a coefficient times the product of the tensor's
extents: 1 for parameters; for FLOPs what `torch.utils.flop_counter` counts in a layer per entry of
its weight, which does not change as the layer shrinks. FLOPs outside convolution and linear layers
stay as they were counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.pruning.model_run import call
from taylor_kernels.pruning.units import Group


@dataclass(frozen=True)
class Cost:
    """Counts: output filters of the layers that can be pruned, and the whole model's parameters
    and FLOPs (on the example inputs, a multiply-add being two)."""

    filters: int
    params: int
    flops: int

    def over(self, whole: Cost) -> dict[str, float]:
        """Each count as a fraction of the whole's."""
        return {
            "filters": self.filters / whole.filters,
            "params": self.params / whole.params,
            "flops": self.flops / whole.flops if whole.flops else 1.0,
        }


class Meter:
    """The cost of a model with some units gone; `take()` updates it.

    Args:
        model: the whole model.
        counted: its FLOPs, from `count_flops`.
        groups: the groups whose filters count.
    """

    def __init__(
        self, model: nn.Module, counted: tuple[dict[str, int], int], groups: Sequence[Group]
    ) -> None:
        per_layer, total = counted
        modules = dict(model.named_modules())
        self._per_weight: dict[str, int] = {}
        for name, flops in per_layer.items():
            weight = modules[name]._parameters.get("weight")
            if weight is not None:
                key = f"{name}.weight" if name else "weight"
                self._per_weight[key] = flops // weight.numel()
        self._extents = {name: list(p.shape) for name, p in model.named_parameters()}
        self._flops = total
        self._params = sum(prod(extents) for extents in self._extents.values())
        self._filters = sum(group.size * group.filters_per_unit for group in groups)

    def take(self, group: Group, units: int) -> None:
        """Count `units` of the group as gone (back again if negative)."""
        self._filters -= units * group.filters_per_unit
        for tensor in {axis.tensor for axis in group.axes} & self._extents.keys():
            extents = self._extents[tensor]
            self._params -= prod(extents)
            self._flops -= self._entry_flops(tensor)
            for axis in group.axes:
                if axis.tensor == tensor:
                    extents[axis.dim] -= units * axis.index.size(1)
            self._params += prod(extents)
            self._flops += self._entry_flops(tensor)

    def _entry_flops(self, tensor: str) -> int:
        return self._per_weight.get(tensor, 0) * prod(self._extents[tensor])

    @property
    def cost(self) -> Cost:
        return Cost(self._filters, self._params, self._flops)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> its shape with the units gone."""
        return {name: tuple(extents) for name, extents in self._extents.items()}


def count_flops(model: nn.Module, example_inputs: Any) -> tuple[dict[str, int], int]:
    """FLOPs of a forward pass: by convolution or linear layer, and of the whole model.

    Args:
        model: in eval mode; it is run once.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a second

    per_layer: dict[str, int] = {}
    hooks = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for name, module in model.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                # A layer that is used twice adds up. (A hook also keeps PyTorch from running a
                # whole encoder layer as one operation, which the counter does not see into.)
                def before(*_: object, name: str = name) -> None:
                    per_layer[name] = per_layer.get(name, 0) - counter.get_total_flops()

                def after(*_: object, name: str = name) -> None:
                    per_layer[name] += counter.get_total_flops()

                hooks += [module.register_forward_pre_hook(before)]
                hooks += [module.register_forward_hook(after)]
        try:
            call(model, example_inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return per_layer, counter.get_total_flops()
