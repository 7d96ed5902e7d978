"""Hugging Face Accelerate: a pruner that knows when gradients are whole, and is saved with the run.

from taylor_kernels.integrations.accelerate import AcceleratedPruner

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
pruner = AcceleratedPruner(accelerator, model, example_inputs, optimizer=optimizer, flops=0.5)
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model(x), y))
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.wrapping import refuse_stale
from taylor_kernels.files import write_atomically
from taylor_kernels.integrations import absent
from taylor_kernels.integrations._trainers import (
    add_histograms,
    moved,
    not_whole,
    plain_optimizers,
    ranks_of_all,
    scalars,
)
from taylor_kernels.pruning import Pruner, PruneRecord
from taylor_kernels.statistics.counting import Mask

try:
    from accelerate import Accelerator, DistributedType
except ModuleNotFoundError as error:
    raise absent(error, "accelerate", "accelerate", "1.15") from error

#: The names that pruners of an accelerator have.
_NAMES: weakref.WeakKeyDictionary[Accelerator, set[str]] = weakref.WeakKeyDictionary()

#: One process, or several under DistributedDataParallel.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class AcceleratedPruner(Pruner):
    """A `tk.Pruner` in a loop of Accelerate's.

    step() is called at every backward pass and scores where the optimizer steps, that is, after the
    last one of an accumulation. The accelerator's scaler is divided out, its trackers are told of
    every pruning, and its `save_state` and `load_state` take the pruner along, compacted or not.
    Where it runs several processes, they prune as one; after compact(), and after a load_state()
    that has cut the model, go on with `model = tk.distributed.rewrapped(model)`, without which the
    next forward pass raises a RuntimeError.

    Args:
        accelerator: whose `prepare` has been given the model and the optimizer.
        model: as `prepare` has returned it.
        example_inputs, criterion, options: as those of `tk.Pruner`.
        optimizer: as `prepare` has returned it, or several.
        name: of the file in the folder of `save_state`; several pruners need several.

    Raises:
        ValueError, TypeError: the accelerator shards parameters (FSDP, DeepSpeed, ...), or has a
            pruner of that name; or as `tk.Pruner` does.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from taylor_kernels.integrations.accelerate import AcceleratedPruner
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> pruner = AcceleratedPruner(
        ...     accelerator, model, torch.randn(1, 4), optimizer=optimizer, filters=0.5, every=1
        ... )
        >>> while not pruner.done:
        ...     accelerator.backward(model(torch.randn(8, 4)).square().mean())
        ...     _ = pruner.step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> pruner.compact()[0]
        Linear(in_features=4, out_features=8, bias=True)
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        example_inputs: Any,
        criterion: str | Criterion | None = None,
        *,
        optimizer: Optimizer | Sequence[Optimizer],
        name: str = "pruner",
        **options: Any,
    ) -> None:
        if accelerator.distributed_type not in _WHOLE:
            raise not_whole(accelerator.distributed_type.value)
        taken = _NAMES.setdefault(accelerator, set())
        if name in taken:
            raise ValueError(
                f"name: the accelerator has a pruner {name!r}, whose file of save_state() this one "
                "would overwrite; give another, as name='second'"
            )
        given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        super().__init__(
            accelerator.unwrap_model(model, keep_torch_compile=False),
            moved(example_inputs, accelerator.device),
            criterion,
            optimizer=plain_optimizers(given),
            scaler=accelerator.scaler,
            ranks=ranks_of_all(),
            **options,
        )
        self.accelerator = accelerator
        self._file = f"{name}.pt"
        self._masks: list[Tensor] = []  # of the backward passes that are accumulated
        taken.add(name)
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                refuse_stale(module)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def step(self, *, mask: Mask | None = None, **options: Any) -> PruneRecord | None:
        """As `tk.Pruner.step`; nothing is scored where gradients are still accumulated.

        Args:
            mask: as there, of the pass just made; it is kept until the others are there.
        """
        if mask is not None:
            self._masks += [mask] if isinstance(mask, Tensor) else mask
        if not self.accelerator.sync_gradients:
            return None
        masks, self._masks = self._masks, []
        record = super().step(mask=masks or None, **options)
        if record is not None:
            self.accelerator.log(scalars(record), step=record.step)
            for tracker in self.accelerator.trackers:
                add_histograms(tracker.tracker, self, record.step)
        return record

    def skip(self) -> None:
        """As `tk.Pruner.skip`, of all passes that are accumulated so far."""
        self._masks = []
        super().skip()

    def absent(self) -> PruneRecord | None:
        """As `tk.Pruner.absent`, of all passes that are accumulated so far."""
        self._masks = []
        return super().absent()

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """Called by save_state() on all ranks."""
        self.sync()
        state = self.state_dict()
        if self.accelerator.is_main_process:
            path = os.path.join(folder, self._file)
            write_atomically(path, lambda file: torch.save(state, file))

    def _load(self, models: list[nn.Module], folder: str) -> None:
        """Called by load_state() before it loads weights, so that the model is cut to take them."""
        path = os.path.join(folder, self._file)
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"load_state: there is no {self._file} in {folder!r}; it was saved without this "
                "pruner, so make the pruner after load_state()"
            )
        self._masks = []
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
