"""How much memory tensors take at the peak of some code, counted and so the same on every run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made inside a call take at the same time.

    Storages of what operations return are counted from their making to their end, a storage that
    several tensors share once; backward passes on the same thread too. What was there before does
    not count, nor does what a kernel takes for itself.

    Example:
        >>> import torch
        >>> x = torch.zeros(250)
        >>> peak_bytes(lambda: (x + 1).sum())
        1004
    """
    with _Living() as living:
        run()
    return living.most


class _Living(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage._cdata not in before and storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._ended, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _ended(self, size: int) -> None:
        self.now -= size


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
