"""What the ops share that change lists of tensors in place, as a step of an optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.layout import in_memory_order
from taylor_kernels.ops._checks import alike, check_like, check_tensor
from taylor_kernels.ops._library import define


def define_in_place(schema: str, run: Callable[..., list[Tensor]]) -> Any:
    """Register an op that returns nothing; `run` gives the tensors that it has changed.

    The schema marks them, as in "Tensor(a!)[] weights". Autograd is told that their values are new,
    so that a backward pass that has saved the old ones says so.
    """

    def changing(*args: Any) -> None:
        torch.autograd.graph.increment_version(run(*args))

    return define(f"{schema} -> ()", changing, lambda *_: None)


def check_lists(**lists: Sequence[Tensor]) -> None:
    """One device, and of every list a tensor like that of the first: shape, dtype, device.

    Raises:
        TypeError, ValueError: the message names the tensor.
    """
    (name, first), *others = lists.items()
    if not first:
        raise ValueError(f"{name}: no tensors; pass at least one")
    for i, tensor in enumerate(first):
        check_tensor(tensor, f"{name}[{i}]")
        if tensor.device != first[0].device:
            raise ValueError(
                f"{name}: [0] is on {first[0].device} and [{i}] on {tensor.device}; one call takes "
                "tensors of one device"
            )
    for other, each in others:
        if len(each) != len(first):
            raise ValueError(f"{other}: {len(each)} tensors for {len(first)} {name}")
        if not alike(each, first):
            for i, (tensor, like) in enumerate(zip(each, first, strict=True)):
                check_like(tensor, f"{other}[{i}]", like, f"{name}[{i}]")


class Changed:
    """Tensors that a kernel changes where they lie, or copies of them that are written back."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def add(self, like: Tensor, tensor: Tensor) -> Tensor:
        """What the kernel is given of a tensor: its elements in the order of those of `like`."""
        view = in_memory_order(like, tensor)
        given = view.contiguous()
        self._tensors.append(tensor)
        if given.data_ptr() != view.data_ptr():
            self._copies.append((view, given))
        return given

    def write_back(self) -> list[Tensor]:
        """After the kernel: all tensors, with their new values."""
        for view, given in self._copies:
            view.copy_(given)
        return self._tensors
