"""Entries of a model's tensors that are held at a number: written again and again, in one call.

On the CPU the native module writes them all, a step's for hundreds of tensors in the time of a few
operations of PyTorch. What it cannot write into, on a GPU or as a part on several ranks, is left to
`fill`, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from taylor_kernels.backends import native
from taylor_kernels.hooks import Hook
from taylor_kernels.pruning.masks.named_tensors import NamedTensors
from taylor_kernels.pruning.removing.optimizer_state import Cuts
from taylor_kernels.pruning.removing.removal import Tensors
from taylor_kernels.shards import fill_part
from taylor_kernels.tracing import Channels

#: (dimension, indices, value) of the entries that are masked, in the order in which to write them.
Fills = list[tuple[int, Tensor, float]]


def fills(
    tensors: Tensors | Mapping[str, Tensor], channels: Channels, entries: Mapping[str, Cuts]
) -> dict[str, Fills]:
    """What masks these entries: parameter or buffer -> what to write; indices where it is."""
    found = {}
    for name, cuts in entries.items():
        values, device = channels.fills.get(name, {}), tensors[name].device
        parts = [(dim, index.to(device), values.get(dim, 0.0)) for dim, index in cuts.items()]
        found[name] = sorted(parts, key=lambda part: part[2] == 0)
    return found


def fill(tensor: Tensor, parts: Fills) -> None:
    """Write into the entries of a tensor what masks them, on whatever device it is now."""
    for dim, index, value in parts:
        fill_part(tensor, dim, index.to(tensor.device), value)  # a trainer may have moved the model


def fill_once(tensors: Sequence[Tensor], parts: Sequence[Fills]) -> None:
    """Write into each of these tensors."""
    found = native.fills(parts)
    left = range(len(tensors)) if found is None else found.write(list(tensors))
    for number in left:
        fill(tensors[number], parts[number])


class HeldEntries:
    """What is held of tensors, by their names.

    Args:
        masked: the tensors, and what to write.
        way: to these tensors, if it is known.
    """

    def __init__(self, masked: Mapping[str, Fills], way: NamedTensors | None = None) -> None:
        self._tensors = NamedTensors(masked) if way is None else way
        self._parts = list(masked.values())
        self._native = native.fills(self._parts)

    def write(self, model: nn.Module, look: bool = False, last: bool = False) -> None:
        """Write the entries into the model's tensors.

        Args:
            look: where the native module writes, spare it if the tensors are the ones that the last
                write with `last` was into, where they were, their versions have not moved, and an
                entry of every masked index, another one at each look, is as it was left. Tensors
                of one dimension are looked at whole, and that is enough.
            last: nothing but what a look would find is expected to change the entries from now on.
        """
        tensors = self._tensors.of(model)
        native = self._native
        left = range(len(tensors)) if native is None else native.write(tensors, look, last)
        for number in left:
            tensor = tensors[number]
            if tensor is None:
                raise RuntimeError(
                    f"model: {self._tensors.names[number]}, of which filters are masked, is gone: "
                    "other code has taken it off; close() the pruner, and make a new one"
                )
            # .data: a forward pass may lie between another one and its backward pass, and the
            # values that are written are the ones that were there.
            fill(tensor.data, self._parts[number])

    def zeroing(self) -> dict[str, Callable[[Tensor], None]]:
        """Name -> a hook that zeroes the entries of the gradient of that parameter."""
        found = {}
        for number, (name, parts) in enumerate(zip(self._tensors.names, self._parts, strict=True)):
            hook = Hook(zero_gradient, parts)
            native = self._native
            found[name] = hook if native is None else native.gradient_hook(number, hook)
        return found


def zero_gradient(parts: Fills, parameter: Tensor) -> None:
    """Zero the masked entries of a parameter's gradient."""
    if parameter.grad is not None and parameter.grad.layout == torch.strided:
        fill(parameter.grad.data, [(dim, index, 0.0) for dim, index, _ in parts])


def zeroes_gradients(hook: object) -> bool:
    """Whether this is a hook that `zeroing` gave."""
    return native.is_gradient_hook(hook) or (isinstance(hook, Hook) and hook.calls(zero_gradient))
