"""An optimizer's state, from whole parameters to the parts of them that ranks hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from taylor_kernels.shards import is_sharded, part_of


@torch.no_grad()
def carry_state(old: Optimizer, new: Optimizer) -> None:
    """Give an optimizer of sharded parameters the state of one of the same parameters, whole.

    For after fully_shard(), which puts new parameters in the place of those that the old optimizer
    holds: load a checkpoint or compact() with that, shard the model, make the new one, carry over.
    Options of the groups, such as learning rates, go along.

    Args:
        old: of whole parameters, the same ones on every rank.
        new: of parameters in the same groups, in the same order.

    Raises:
        ValueError: their groups hold other numbers of parameters, or parameters of other shapes.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> old = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> old.step()
        >>> new = torch.optim.SGD([torch.nn.Parameter(weight.detach())], lr=1.0, momentum=0.9)
        >>> tk.distributed.carry_state(old, new)
        >>> new.param_groups[0]["lr"], [*new.state.values()][0]["momentum_buffer"]
        (0.1, tensor([1., 1., 1.]))
    """
    for name, one in (("old", old), ("new", new)):
        if not isinstance(one, Optimizer):
            raise TypeError(f"{name}: expected a torch.optim.Optimizer, got {type(one).__name__}")
    shapes = [
        [[tuple(p.shape) for p in group["params"]] for group in one.param_groups]
        for one in (old, new)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "new: its groups hold parameters of other shapes, or in another order, than the old "
            "optimizer's; make both of the same model in the same way"
        )
    for group, target in zip(old.param_groups, new.param_groups, strict=True):
        target.update({key: _copied(value) for key, value in group.items() if key != "params"})
        for parameter, part in zip(group["params"], target["params"], strict=True):
            if parameter in old.state:
                state = old.state[parameter]
                new.state[part] = {key: _carried(value, part) for key, value in state.items()}


def _copied(option: Any) -> Any:
    """A rate that is a tensor is changed in place; one memory would make it that of both."""
    if isinstance(option, Tensor):
        return option.detach().clone()
    if type(option) in (list, tuple):
        return type(option)(map(_copied, option))
    return option


def _carried(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if is_sharded(parameter) and value.shape == parameter.shape:
        return part_of(value, parameter)
    return value.clone()
