"""What modules keep of their parameters while they are in eval mode.

LeViT's attention looks its biases up once, and drops what it has found as train mode begins;
EfficientFormer's makes it anew as eval mode begins. Both say so in a `train` method of their own.
Where parameters have changed while such a module was in eval mode, what it keeps is old.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import FunctionType

import torch
from torch import Tensor, nn

#: What every module has.
COMMON = frozenset(vars(nn.Module()))
#: Attributes of these types are no tensors. Most modules have no others, and a model has tens of
#: thousands of attributes.
_NO_TENSORS = {
    type(None), bool, int, float, str, tuple, set, list, dict, OrderedDict, FunctionType
}  # fmt: skip
_CONTAINERS = (dict, OrderedDict, list)
_COMMON_TYPES = [type(value) for value in vars(nn.Module()).values()]
_COMMON_CONTAINERS = [_COMMON_TYPES.count(kind) for kind in _CONTAINERS]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """`dict(model.named_modules())`, whose generators in generators take several times as long for
    a large model."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        inside = f"{name}." if name else ""
        waiting += [
            (inside + own, part)
            for own, part in reversed(module._modules.items())
            if part is not None
        ]
    return found


def held_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors that modules hold as attributes, or in dictionaries and lists that are such,
    beside parameters and buffers."""
    for module in modules:
        attributes = vars(module)
        types = list(map(type, attributes.values()))
        containers = [types.count(kind) for kind in _CONTAINERS]
        if containers == _COMMON_CONTAINERS and _NO_TENSORS.issuperset(types):
            continue
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                yield value
            elif name not in COMMON and isinstance(value, (dict, list)):
                inside = value.values() if isinstance(value, dict) else value
                yield from (part for part in inside if isinstance(part, Tensor))


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module holds as attributes of its own, as tables of positions that were
    not registered as buffers; not those that are trained."""
    attributes = vars(module)
    if _NO_TENSORS.issuperset(map(type, attributes.values())):
        return {}
    return {
        name: value
        for name, value in attributes.items()
        if isinstance(value, Tensor)
        and value.dim()
        and value.layout == torch.strided
        and not (value.requires_grad or value.is_meta)
    }


def keeping(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that do something of their own as their mode changes."""
    return [module for module in modules if type(module).train is not nn.Module.train]


@torch.no_grad()
def renew(modules: Iterable[nn.Module]) -> None:
    """Let those of `keeping(modules)` that are in eval mode make anew what they keep in it.

    They are put into train mode and back; which of their parts train stays as it is.
    """
    for module in keeping(modules):
        if module.training:
            continue
        modes = [(part, part.training) for part in module.modules()]
        module.train()
        module.eval()
        for part, training in modes:
            if part.training is not training:
                part.training = training
