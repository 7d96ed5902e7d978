"""Norms across channels while some of these are masked: run on those that are kept.

A LayerNorm or RMSNorm takes its statistics of all channels, so zeros count in them. While channels
are masked, the module is run on the kept ones with its parameters cut to them, as it will run once
the others are removed, and the masked channels of its output are zeros:

    y[kept] = norm(x[kept], γ[kept], β[kept]),    y[others] = 0

That is what masking and removing a channel of such a norm mean in this package. A module whose
parameters do not lie along the channels (CBAM's spatial attention, with a convolution in it) is run
once, on the kept ones. A router of a mixture of experts is treated alike (kept_experts.py): it
chooses among those that are kept. A copy of the model does the same, and so does a saved one, since
its outputs are made of it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taylor_kernels.pruning.masks.called_norms import KeptCalls
from taylor_kernels.pruning.masks.kept_experts import KeptExperts
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.model.settings import set_attribute
from taylor_kernels.tracing.notes.across import Kept


class OnKept:
    """What a module is given, and what it returns, of the channels that are kept.

    It is saved with a model that is saved whole, and so holds nothing but tensors and plain Python.

    Args:
        kept: which those are, and where.
    """

    #: Of models that were saved before layers were among these modules.
    _weights: Mapping[str, int] = {}

    def __init__(self, kept: Kept) -> None:
        self._dim, self._kept, self._width, self._rank, self._returned, self._cuts = kept[:6]
        self._weights = dict(kept.weights)

    def _of_kept(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with what is kept of the one tensor among them."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(inputs) != 1:
            raise _another(module, f"was given {len(inputs)} tensors", "gave it one")
        whole, dim, rank = inputs[0], self._dim, self._rank
        shape = tuple(whole.shape)
        # Behind a weight that lies along the last dimension it is the last at any number of these.
        known = whole.dim() == rank or (self._cuts and dim == -1 and whole.dim())
        if not known or shape[dim] != self._width:
            there = f"{rank} dimensions, of which number {rank + dim} is {self._width} long"
            raise _another(module, f"was given a tensor of shape {shape}", f"gave it {there}")
        self._kept = self._kept.to(whole.device)
        order, back = _laid_out(whole)
        kept = whole.permute(order).index_select(order.index(dim % whole.dim()), self._kept)
        kept = kept.permute(back)
        return (
            tuple(kept if value is whole else value for value in args),
            {name: kept if value is whole else value for name, value in kwargs.items()},
        )

    def _among_zeros(self, module: nn.Module, found: Any) -> Any:
        """What the module returns for the kept channels, with zeros for the others."""
        if not self._returned:
            return found
        dim, kept = self._dim, self._kept
        if not isinstance(found, Tensor):
            raise _another(module, f"returned a {type(found).__name__}", "had it return a tensor")
        if found.dim() < -dim or found.size(dim) != kept.numel():
            what = f"returned a tensor of shape {tuple(found.shape)}"
            raise _another(module, what, "had it return the channels that it was given")
        order, back = _laid_out(found)
        found = found.permute(order)
        place, shape = order.index(dim % found.dim()), list(found.shape)
        shape[place] = self._width
        kept = kept.to(found.device)
        return found.new_zeros(shape).index_copy(place, kept, found).permute(back)


class KeptInput(OnKept):
    """A forward pre-hook: a module without parameters along its channels gets those that are kept.

    `KeptOutput`, a forward hook, gives the others back as zeros. The module runs once, since there
    may be modules in it that count what they see, as BatchNorm does.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._of_kept(module, args, kwargs)


class KeptOutput(OnKept):
    """The forward hook that goes with `KeptInput`."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        return self._among_zeros(module, output)


class KeptAgain(OnKept):
    """A forward hook that runs its module again on the channels that are kept.

    What the first run has written into the module's buffers is taken back: they learn from the
    second, in the entries that are kept. `begin`, a forward pre-hook, remembers them.

    Args:
        kept: which those are, and where.
        attributes: what the module's attributes are once the others are gone.
    """

    def __init__(self, kept: Kept, attributes: Mapping[str, Any]) -> None:
        super().__init__(kept)
        self._attributes = dict(attributes)
        # Of the runs of threads: buffers, their versions and values.
        self._before: dict[int, dict[str, tuple[Tensor, int, Tensor]]] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: what the first run writes into buffers can be taken back."""
        self._before[threading.get_ident()] = {
            name: (buffer, buffer._version, buffer.clone())
            for name, buffer in module._buffers.items()
            if buffer is not None
        }

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        args, kwargs = self._of_kept(module, args, kwargs)
        new = copy.copy(module)
        for name, value in self._attributes.items():
            set_attribute(new, name, value)
        if self._cuts:
            vars(new)["_parameters"] = self._cut(module._parameters)
        # Asked for where `begin` is called alone: torch.compile cannot read what a thread is.
        before = self._before.pop(threading.get_ident(), None) if self._before else None
        if before is None:
            return self._among_zeros(module, new.forward(*args, **kwargs))
        with torch.no_grad():
            for name, (old, version, value) in before.items():
                buffer = module._buffers[name]
                if buffer is not None and (buffer is not old or buffer._version != version):
                    buffer.copy_(value)
            whole = {name: b for name, b in module._buffers.items() if b is not None}
            buffers = self._cut(whole) if self._cuts else {n: b.clone() for n, b in whole.items()}
        vars(new)["_buffers"] = {**dict.fromkeys(module._buffers), **buffers}
        versions = {name: buffer._version for name, buffer in buffers.items()}
        found = self._among_zeros(module, new.forward(*args, **kwargs))
        with torch.no_grad():
            for name, version in versions.items():
                now = new._buffers[name]
                if now is None or (now is buffers[name] and now._version == version):
                    continue
                if self._cuts:
                    whole[name].index_copy_(_along(whole[name]), self._kept, now)
                else:
                    whole[name].copy_(now)
        return found

    def _cut(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """The cut ones are no leaves: their gradients go on to the whole ones."""
        along = self._weights
        return {
            name: tensor
            if tensor is None or (along and name not in along)
            else tensor.index_select(along.get(name, _along(tensor)), self._kept)
            for name, tensor in tensors.items()
        }


def _along(tensor: Tensor) -> int:
    """The dimension of a parameter or buffer that its channels lie along: the others are of size
    1."""
    return tensor.shape.index(max(tensor.shape))


def _laid_out(tensor: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions as they lie in memory, outermost first, and the order that undoes it.

    Code behind a norm may view what it returns in that order, as it may before masks.
    """
    strides = tensor.stride()
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    return order, [order.index(dim) for dim in range(tensor.dim())]


def _another(module: nn.Module, what: str, where: str) -> RuntimeError:
    return RuntimeError(
        f"model: a {type(module).__name__} some of whose channels are masked {what}, where the "
        f"example inputs {where}; compact() first"
    )


def keep_only(
    modules: Mapping[str, nn.Module],
    channels: Channels,
    dead: Sequence[Tensor],
    attributes: Mapping[str, Mapping[str, Any]],
    before: Sequence[Tensor] | None = None,
) -> list[RemovableHandle]:
    """Have the norms across channels, and routers, run on what the dead units leave.

    Args:
        attributes: what those of modules will be once all units are removed.
        before: for each group [U] bool, True for units that have been removed.

    Returns:
        The hooks.
    """
    hooks = [
        modules[name].register_forward_hook(
            KeptExperts(kept.to(_device(modules[name])), results),
            prepend=True,
            with_kwargs=True,
        )
        for name, (kept, results) in channels.kept_by_routers(dead, before).items()
    ]
    for name, kept in channels.kept_by_norms(dead, before).items():
        hooks += _run_on(modules[name], kept, attributes.get(name, {}))
    for name, calls in channels.kept_by_called_norms(dead, before).items():
        called, module = KeptCalls(calls), modules[name]
        hooks.append(module.register_forward_pre_hook(called.begin))
        hooks.append(module.register_forward_hook(called, prepend=True, always_call=True))
    return hooks


def _run_on(
    norm: nn.Module, kept: Kept, attributes: Mapping[str, Any]
) -> Iterator[RemovableHandle]:
    """Have a norm across channels run on the kept ones."""
    kept = kept._replace(places=kept.places.to(_device(norm)))
    if kept.weights:  # what counts its outputs stays, as they do
        attributes = {name: attributes[name] for name in kept.counting if name in attributes}
    # The hooks come before those of others, which see the output as it is.
    if kept.cut or attributes:
        again = KeptAgain(kept, attributes)
        if any(buffer is not None for buffer in norm._buffers.values()):
            yield norm.register_forward_pre_hook(again.begin)
        yield norm.register_forward_hook(again, prepend=True, with_kwargs=True)
    else:
        yield norm.register_forward_pre_hook(KeptInput(kept), with_kwargs=True)
        yield norm.register_forward_hook(KeptOutput(kept), prepend=True, with_kwargs=True)


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
