"""Ranks whose loaders end early, under PyTorch's own context for them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from taylor_kernels.distributed.ranks import Ranks

if dist.is_available():
    from torch.distributed.algorithms.join import Joinable, JoinHook
else:  # a PyTorch that was built without it has no ranks to join
    Joinable = JoinHook = object  # type: ignore[assignment,misc]


class _Absent(Protocol):
    """A `Pruner` or an `Importance`."""

    @property
    def ranks(self) -> Ranks | None: ...

    def absent(self) -> object: ...


class Joining(Joinable):
    """Lets a pruner or a meter take part in `torch.distributed.algorithms.join.Join`.

    In that context a rank whose loader has ended shadows what DistributedDataParallel sends until
    the others are done; with this behind it in the list, it calls `absent()` for each of them too.

    Args:
        meter: a `tk.Pruner` or `tk.Importance` with `ranks`, stepped or updated once per forward
            pass of the wrapper.

    Raises:
        ValueError: it has no ranks.

    Example:
        >>> import os, tempfile, torch, torch.distributed as dist, taylor_kernels as tk
        >>> from torch.distributed.algorithms.join import Join
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = dist.FileStore(os.path.join(folder.name, "store"), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = torch.nn.Linear(4, 3)
        >>> ddp = torch.nn.parallel.DistributedDataParallel(model)
        >>> imp = tk.Importance(model, "taylor_fo_gate", ranks=tk.distributed.Ranks())
        >>> with Join([ddp, tk.distributed.Joining(imp)]):
        ...     for x in torch.randn(16, 4).split(8):  # on each rank as many as it has
        ...         ddp(x).square().mean().backward()
        ...         imp.update()
        >>> imp.compute()[""].shape
        torch.Size([3])
        >>> dist.destroy_process_group()
        >>> folder.cleanup()
    """

    def __init__(self, meter: _Absent) -> None:
        super().__init__()
        if not hasattr(meter, "ranks"):
            raise TypeError(
                f"meter: expected a tk.Importance or a tk.Pruner, got {type(meter).__name__}"
            )
        if meter.ranks is None:
            raise ValueError("meter: it has no ranks=, so there is no one to wait for it")
        self._meter, self._ranks = meter, meter.ranks

    def join_hook(self, **_: Any) -> JoinHook:
        return _Hook(self._meter)

    @property
    def join_device(self) -> torch.device:
        return self._ranks.device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        return self._ranks.group


class _Hook(JoinHook):
    def __init__(self, meter: _Absent) -> None:
        self._meter = meter

    def main_hook(self) -> None:
        self._meter.absent()
