"""Physical removal: indices are deleted from parameters, buffers, gradients, optimizer state."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from taylor_kernels.pruning.removing.optimizer_state import (
    Kept,
    check_complete,
    check_follows,
    cut,
    follow,
    optimizers_in,
)
from taylor_kernels.pruning.removing.reordering import reorder
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.blocks import Place, replace_modules
from taylor_kernels.tracing.model.caches import plain_tensors
from taylor_kernels.tracing.model.settings import get_attribute, set_attribute
from taylor_kernels.tracing.multihead import follow_attention
from taylor_kernels.tracing.run.shared_memory import place_of


class Removal(NamedTuple):
    """What was taken off a model.

    Attributes:
        cuts: tensor -> dimension -> indices [n].
        attributes: module -> attribute -> what it became.
        places: what whole blocks have left of modules.
        orders: tensor -> dimension -> which of the places [n] that are left along it comes first,
            second and so on, where the order has changed.
    """

    cuts: dict[str, dict[int, Tensor]]
    attributes: dict[str, dict[str, Any]]
    places: tuple[Place, ...]
    orders: dict[str, dict[int, Tensor]]


def remove(
    model: nn.Module,
    channels: Channels,
    dead: Sequence[Tensor],
    optimizer: object = None,
    stepped: Collection[Optimizer] = (),
) -> None:
    """Remove the dead units ([U] bool per group) from the model, in place.

    Parameters are replaced by smaller ones, with their gradients, `requires_grad`, memory format,
    attributes and hooks (handles of hooks still take them off); the optimizers' parameter groups
    and state follow, and so do module attributes that count channels.

    Args:
        optimizer: one, or a sequence of them.
        stepped: the optimizers that have made steps.

    Raises:
        ValueError: a state tensor of the optimizer has no dimensions of the parameter's, or an
            optimizer that is not given holds state beside it. Nothing is changed then.
    """
    modules = dict(model.named_modules())
    entries, tensors = channels.entries(dead), Tensors(modules)
    old = {name: tensors[name] for name in entries}
    optimizers = optimizers_in(optimizer)
    for name, cuts in entries.items():
        check_follows(optimizers, name, old[name], cuts)
    if optimizers:
        check_complete(optimizers, stepped, old)
    orders = channels.orders(dead)
    new = _all_smaller(old, entries)
    tensors.put(new)
    set_attributes(modules, channels.attributes(dead))
    follow(optimizers, {n: (old[n], new[n], cuts) for n, cuts in entries.items()})
    reorder(new, orders, optimizers)


def cut_model(model: nn.Module, removal: Removal) -> None:
    """Take off a whole model what was taken off another, in place."""
    replace_modules(model, removal.places)
    modules = dict(model.named_modules())
    tensors = Tensors(modules)
    new = _all_smaller({name: tensors[name] for name in removal.cuts}, removal.cuts)
    tensors.put(new)
    reorder(new, removal.orders)
    for name, own in removal.attributes.items():
        like = {key: _like(get_attribute(modules[name], key), value) for key, value in own.items()}
        set_attributes(modules, {name: like})


def lookup(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, sooner than `get_submodule` leads to it: masks ask for
    hundreds at every step."""
    *path, leaf = name.split(".")
    for part in path:
        model = model._modules[part]  # type: ignore[assignment]
    return getattr(model, leaf)


class Tensors:
    """The parameters, buffers and plain tensors of a model by name; a shared one goes by its first
    name.

    Args:
        modules: dict(model.named_modules()).
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._holders: dict[str, list[tuple[nn.Module, str]]] = {}
        firsts: dict[int, str] = {}
        for prefix, module in modules.items():
            tables = module._parameters, module._buffers, plain_tensors(module)
            for leaf, tensor in chain.from_iterable(table.items() for table in tables):
                if tensor is not None:
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    first = firsts.setdefault(id(tensor), name)
                    self._holders.setdefault(first, []).append((module, leaf))

    def __getitem__(self, name: str) -> Tensor:
        module, leaf = self._holders[name][0]
        return getattr(module, leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def own_plain(self, names: Collection[str]) -> None:
        """Give the model copies of those of these that are plain attributes: such a table may be
        one that other models hold too."""
        self.put(
            {
                name: self[name].clone()
                for name in names
                if all(leaf in vars(module) for module, leaf in self._holders[name])
            }
        )

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put others in the places of those of these names."""
        for name, tensor in tensors.items():
            for module, leaf in self._holders[name]:
                held = leaf in module._parameters or leaf in module._buffers
                if not held or type(module).__setattr__ is not nn.Module.__setattr__:
                    # Recurrent layers keep a list of their parameters beside.
                    setattr(module, leaf, tensor)
                    _refer_to(module, leaf, tensor)
                elif leaf in module._parameters:
                    module._parameters[leaf] = tensor  # type: ignore[assignment]
                else:
                    module._buffers[leaf] = tensor


def _refer_to(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """A recurrent layer asks for its weights, one by one, until one is another object than in its
    last run. A weight that a parametrization works out always is, and each time that it is asked
    for a spectral norm takes a step. So the layer is to know those that were put in its place."""
    names = getattr(module, "_flat_weights_names", ())
    refs = getattr(module, "_flat_weight_refs", None)
    if leaf in names and refs is not None and is_parametrized(module):
        refs[names.index(leaf)] = weakref.ref(tensor)


def set_attributes(
    modules: Mapping[str, nn.Module], values: Mapping[str, Mapping[str, object]]
) -> None:
    """Set attributes that count channels.

    Args:
        values: module -> attribute -> its new value.
    """
    for name, own in values.items():
        follow_attention(modules, name)
        for attribute, value in own.items():
            set_attribute(modules[name], attribute, value)


def _all_smaller(
    old: Mapping[str, Tensor], entries: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, Tensor]:
    """`smaller` of each of these; those that were the same memory are so again."""
    kept: Kept = {}
    new: dict[str, Tensor] = {}
    firsts: dict[tuple, str] = {}
    for name, cuts in entries.items():
        new[name] = smaller(old[name], cuts, kept)
        if old[name].layout is torch.strided and old[name].numel():
            first = firsts.setdefault(place_of(old[name]), name)
            if new[first].shape == new[name].shape:
                new[name].data = new[first].data
    return new


def smaller(
    tensor: Tensor,
    cuts: Mapping[int, Tensor],
    kept: Kept | None = None,
    *,
    may_share: bool = False,
) -> Tensor:
    """A parameter, with its gradient, or a buffer without these indices.

    Args:
        kept, may_share: see `cut`.
    """
    new = cut(tensor.detach(), cuts, kept, may_share=may_share)
    if not isinstance(tensor, nn.Parameter):
        return new
    parameter = nn.Parameter(new, tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = cut(tensor.grad.detach(), cuts, kept)
    vars(parameter).update(vars(tensor))
    # The tables themselves: the handles that were given out for hooks point at these.
    for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if hooks := getattr(tensor, table, None):
            setattr(parameter, table, hooks)
    return parameter


def _like(old: Any, value: Any) -> Any:
    """A value that a file may hold as a list, of the type that the attribute has."""
    return tuple(value) if isinstance(old, tuple) else value
