"""Tensors of a model that lie in the same memory without being one.

`decoder.weight.data = encoder.weight.data` ties two parameters: what is written into one of them is
in the other too, though each has a gradient of its own. A copy of the model does not tell: PyTorch
gives each parameter memory of its own there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from taylor_kernels.tracing.model.caches import held_tensors, keeping
from taylor_kernels.tracing.notes.atoms import Reason
from taylor_kernels.tracing.notes.operations import memory_of
from taylor_kernels.tracing.run.running import is_lazy, tensors_of_modules

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.recorder import Recorder


class Shared(NamedTuple):
    """Parameters and buffers that share memory, by their names.

    Attributes:
        whole: (first, other) of those that are the same entries in the same order.
        partly: name -> another that has some of its entries, or all in another order, or is a plain
            attribute; "" for a tensor that has no name.
    """

    whole: list[tuple[str, str]]
    partly: dict[str, str]


def find_shared(
    modules: Mapping[str, nn.Module], found_tensors: Mapping[str, Tensor] | None = None
) -> Shared:
    """The parameters and buffers of a model that share memory.

    What modules keep of their parameters in eval mode, and make anew there, does not count.

    Args:
        modules: dict(model.named_modules()).
        found_tensors: the parameters and buffers, where the caller has looked for them already.
    """
    if found_tensors is None:
        parameters, buffers = tensors_of_modules(modules)
        found_tensors = parameters | buffers
    tensors = list(found_tensors.items())
    known = {id(tensor) for _, tensor in tensors}
    for module in keeping(modules.values()):
        known.update(map(id, held_tensors(module.modules())))
    for module in modules.values():
        if isinstance(module, nn.RNNBase):
            # Of weights that are worked out it makes this list anew with each run.
            known.update(map(id, module._flat_weights))
    tensors += [("", t) for t in held_tensors(modules.values()) if id(t) not in known]
    together: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if not is_lazy(tensor) and tensor.layout is torch.strided:
            together.setdefault(memory_of(tensor), []).append((name, tensor))
    found = Shared([], {})
    sharing = [same for same in together.values() if len(same) > 1]
    if not sharing:
        return found
    # Plain tables get memory of their own as they are masked: they cannot be tied to others.
    registered = {
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in modules.items()
        for leaf in (*module._parameters.keys(), *module._buffers.keys())
    }
    for same in sharing:
        _compare(same, registered, found)
    return found


def go_together(recorder: Recorder, tensors: Mapping[str, Tensor], shared: Shared) -> None:
    """Make the channels of tensors that are the same memory one, and keep those of others.

    Args:
        tensors: those that the recorder has given atoms, by name.
    """
    for first, other in shared.whole:
        one, two = recorder.labels(tensors[first]), recorder.labels(tensors[other])
        for mine, theirs in zip(one.dims, two.dims, strict=True):
            recorder.record.join(mine, theirs, ("", "memory"))
    for name, other in shared.partly.items():
        what = repr(other) if other else "a tensor that is neither a parameter nor a buffer"
        reason = Reason(f"shares its memory with {what}")
        for vector in recorder.labels(tensors[name]).dims:
            recorder.record.fix(vector, reason)


def place_of(tensor: Tensor) -> tuple:
    """Where the entries of a strided tensor lie: the same for two that are the same entries."""
    return memory_of(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _compare(tensors: list[tuple[str, Tensor]], registered: Collection[str], found: Shared) -> None:
    """Write down which of these tensors of one memory share some of it.

    Args:
        registered: the names of parameters and buffers.
    """
    first: dict[tuple, str] = {}
    for number, (name, tensor) in enumerate(tensors):
        key = place_of(tensor), name in registered
        if name and (same := first.setdefault(key, name)) != name:
            found.whole.append((same, name))
            continue
        for other, earlier in tensors[:number]:
            if other and _meet(earlier, tensor):
                found.partly[other] = name
                if name:
                    found.partly[name] = other


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one memory share an entry of it."""
    spans = []
    for tensor in (one, other):
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in strides)
        width = tensor.element_size()
        spans.append((tensor.storage_offset() * width, (last + 1) * width))
    start, end = max(spans)[0], min(stop for _, stop in spans)
    if start >= end or not one.numel() or not other.numel():
        return False
    if one.dtype != other.dtype:
        return True
    marks = torch.zeros(max(stop for _, stop in spans) // one.element_size(), dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())
