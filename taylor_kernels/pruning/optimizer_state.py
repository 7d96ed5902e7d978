"""An optimizer's state follows the model: it is masked and cut with the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

Cuts = Mapping[int, Tensor]  # dimension -> the indices that go


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it wraps, which may hold the state (as SAM and Lookahead do)."""
    found: list[Optimizer] = []
    seen: set[int] = set()
    held: list[object] = [optimizer]
    for value in held:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Optimizer):
            found.append(value)
            seen |= {id(value.state), id(value.param_groups)}  # an entry for every parameter
            held += vars(value).values()
        elif isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, (list, tuple)):
            held += value
    return found


def check_follows(optimizer: Optimizer, name: str, parameter: Tensor, cuts: Cuts) -> None:
    """The state of a parameter can be cut with it.

    Raises:
        ValueError: a state tensor has no dimensions of the parameter's.
    """
    for one in optimizers_in(optimizer):
        for key, value in one.state.get(parameter, {}).items():
            _state_cuts(name, key, value, parameter, cuts)


def follow(optimizer: Optimizer, new: Mapping[str, tuple[Tensor, Tensor, Cuts]]) -> None:
    """Put new parameters in the place of old ones, with their state cut.

    Args:
        new: name -> the old parameter, the new one, and what was cut.
    """
    replaced = {old: parameter for old, parameter, _ in new.values()}
    for one in optimizers_in(optimizer):
        for group in one.param_groups:
            group["params"] = [replaced.get(p, p) for p in group["params"]]
        for name, (old, parameter, cuts) in new.items():
            if old in one.state:
                state = one.state.pop(old)
                for key, value in state.items():
                    if own := _state_cuts(name, key, value, old, cuts):
                        state[key] = cut(value, own)
                one.state[parameter] = state


def zero_state(optimizer: Optimizer, name: str, parameter: Tensor, cuts: Cuts) -> None:
    """Set the state of masked entries to zero, which is where removal would have left them."""
    for one in optimizers_in(optimizer):
        for key, value in one.state.get(parameter, {}).items():
            for dim, index in _state_cuts(name, key, value, parameter, cuts).items():
                value.index_fill_(dim, index.to(value.device), 0)


def cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    """The tensor without these indices."""
    for dim, index in cuts.items():
        keep = torch.ones(tensor.size(dim), dtype=torch.bool)
        keep[index] = False
        tensor = tensor.index_select(dim, keep.nonzero().flatten().to(tensor.device))
    return tensor


def _state_cuts(name: str, key: str, value: object, parameter: Tensor, cuts: Cuts) -> Cuts:
    """The cuts that apply to a state tensor: those along dimensions it has in full."""
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return {}
    pairs = list(zip(value.shape, parameter.shape, strict=False))
    if value.dim() != parameter.dim() or any(mine not in (1, theirs) for mine, theirs in pairs):
        raise ValueError(
            f"optimizer: its state {key!r} of {name!r} has shape {tuple(value.shape)}, which does "
            f"not follow the parameter's {tuple(parameter.shape)}, so it cannot be cut with it; "
            "use an optimizer whose state has an entry per weight (SGD, Adam, ...), or build the "
            "pruner with optimizer=None and make a new optimizer after compact()"
        )
    return {dim: index for dim, index in cuts.items() if value.size(dim) == parameter.size(dim)}
