"""DistributedDataParallel made anew around a model whose parameters are others now."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from taylor_kernels.hooks import Hook

#: Arguments of DistributedDataParallel that it keeps under their own name.
_KEPT = (
    "device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
    "gradient_as_bucket_view", "static_graph", "mixed_precision", "skip_all_reduce_unused_params",
)  # fmt: skip


def rewrapped(ddp: DistributedDataParallel, **changed: Any) -> DistributedDataParallel:
    """A new DistributedDataParallel around the same module, with the same settings.

    `Pruner.compact()` puts smaller parameters in place of the old ones, which the old wrapper goes
    on averaging. To be called on every rank: making one is collective. The new one raises
    a RuntimeError, in place of training, once its own parameters are replaced.

    Args:
        changed: arguments of DistributedDataParallel that are to be others.

    Raises:
        TypeError: it is no DistributedDataParallel.
        ValueError: it has communication hooks, whose states are of the old shapes.

    Example:
        >>> import os, tempfile, torch, torch.distributed as dist, taylor_kernels as tk
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = dist.FileStore(os.path.join(folder.name, "store"), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> ddp = torch.nn.parallel.DistributedDataParallel(model)
        >>> pruner = tk.Pruner(
        ...     model, torch.randn(1, 4), "magnitude_l2", filters=0.5, every=1, per_step=4,
        ...     optimizer=torch.optim.SGD(model.parameters(), 0.1), ranks=tk.distributed.Ranks()
        ... )
        >>> _ = pruner.step()
        >>> _ = pruner.compact()
        >>> ddp = tk.distributed.rewrapped(ddp)
        >>> ddp.module[0]
        Linear(in_features=4, out_features=4, bias=True)
        >>> dist.destroy_process_group()
        >>> folder.cleanup()
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp: expected a DistributedDataParallel, got {type(ddp).__name__}")
    if getattr(ddp, "_comm_hooks", None):
        raise ValueError(
            "ddp: it has communication hooks, whose states may be of the old shapes; make a new "
            "DistributedDataParallel and register them with new states"
        )
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    kept = [name for name in (*_KEPT, buffers) if name in known and hasattr(ddp, name)]
    settings = {name: getattr(ddp, name) for name in kept}
    new = DistributedDataParallel(ddp.module, **(settings | changed))
    refuse_stale(new)
    return new


def refuse_stale(ddp: DistributedDataParallel) -> None:
    """Let it raise a RuntimeError, in place of training, once its parameters are replaced.

    It would go on averaging the old ones, and the ranks would train apart.
    """
    # The wrapper itself keeps these parameters, so that no other gets one of their ids.
    held = frozenset(map(id, ddp.module.parameters()))
    ddp.register_forward_pre_hook(Hook(_check_current, held))


def _check_current(held: frozenset[int], ddp: DistributedDataParallel, *_: object) -> None:
    if torch.is_grad_enabled() and any(
        id(p) not in held for p in ddp.module.parameters() if p.requires_grad
    ):
        raise RuntimeError(
            "model: this DistributedDataParallel was made before compact(), or load_state(), put "
            "smaller parameters in place of those that it averages; go on with "
            "model = tk.distributed.rewrapped(model), on every rank"
        )
