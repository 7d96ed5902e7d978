"""The memory that a run knows its values by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.tracing.notes.operations import memory_of


class Memories:
    """Keeps the numbers of memory that has gone from being given to other memory.

    `memory_of` is an address, and a tensor that code makes out of sight of the run (`torch.tensor`
    of a number) often gets that of one that has just gone. Only PyTorch's few words on a memory are
    held, and not what is in it.
    """

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def hold(self, tensor: Tensor) -> int:
        """The number of this tensor's memory, which stays its own until `release`."""
        key = memory_of(tensor)
        if key >= 0 and key not in self._held:
            self._held[key] = tensor.untyped_storage()._weak_ref()
        return key

    def alive(self, keys: Iterable[int]) -> bool:
        """Whether any of these memories, which are held, has not gone."""
        gone = torch.UntypedStorage._expired
        return any(not gone(self._held[key]) for key in keys if key in self._held)

    def release(self) -> None:
        """The run is over."""
        while self._held:
            torch.UntypedStorage._free_weak_ref(self._held.popitem()[1])
