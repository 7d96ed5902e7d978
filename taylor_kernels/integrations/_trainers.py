"""What the doors into trainers share: a pruner that is made when a trainer has all it needs.

A trainer's callback is made before the optimizers are, before the model is on its device and before
a checkpoint is read. The pruner is made afterwards, between that and the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from taylor_kernels.distributed import Ranks
from taylor_kernels.pruning import Pruner, PruneRecord
from taylor_kernels.shards import in_parts

#: Arguments of `Pruner` that the trainer knows better.
_OF_THE_TRAINER = ("model", "optimizer", "scaler", "ranks")


class TrainedPruner:
    """The pruner of a model that a trainer trains, from its first step on.

    Args:
        padding: the name of the mask in a batch that is a dict, 0 where there is padding; None
            where all examples count.
        options: further arguments of `tk.Pruner`.

    Attributes:
        pruner: None until `begin`.
        example_inputs: may be set until then.

    Raises:
        ValueError: an option is one that the trainer gives.
    """

    def __init__(
        self,
        example_inputs: Any,
        criterion: Any,
        padding: str | None,
        options: Mapping[str, Any],
    ) -> None:
        if given := [name for name in _OF_THE_TRAINER if name in options]:
            raise ValueError(f"{given[0]}: the trainer gives it; leave it out")
        self.pruner: Pruner | None = None
        self.example_inputs = example_inputs
        self._criterion, self._padding, self._options = criterion, padding, options
        self._masks: list[Tensor] = []  # of the forward passes since the last step

    def begin(
        self, model: nn.Module, optimizers: list[Optimizer], scaler: GradScaler | None
    ) -> Pruner:
        """Make the pruner, or go on with the one of an earlier training of the same model.

        Raises:
            ValueError: the parameters of the model are in parts (`not_whole`); the criterion runs
                the model itself; or as `tk.Pruner` does.
        """
        if self.pruner is not None and self.pruner.model is model:
            self.pruner.use_optimizer(optimizers, scaler=scaler)
            self.skip()  # what a training that ended early has left
            self.pruner.sync()  # ranks have kept that for one another, and a state would lack it
            return self.pruner
        if in_parts(model):
            raise not_whole("its strategy")
        device = next(model.parameters()).device
        pruner = Pruner(
            model,
            moved(self.example_inputs, device),
            self._criterion,
            optimizer=optimizers,
            scaler=scaler,
            ranks=ranks_of_all(),
            **self._options,
        )
        if pruner.needs_closure:
            pruner.close()
            raise ValueError(
                f"criterion: {pruner.criterion.name!r} runs the model itself, which a callback "
                "cannot; take one that reads gradients (tk.criterion_names()), or tk.Pruner in a "
                "loop of your own"
            )
        self.pruner = pruner
        return pruner

    def note(self, batch: object) -> None:
        """The model runs on this batch, or has done so.

        Raises:
            ValueError: it has no mask of that name.
        """
        if self._padding is None:
            return
        mask = batch.get(self._padding) if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor):
            names = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else "no names"
            raise ValueError(
                f"padding: the batch has no tensor {self._padding!r}, it has {names}; name what is "
                "0 where there is padding, or leave it out"
            )
        self._masks.append(mask)

    def step(self) -> PruneRecord | None:
        """Score what came since the last step."""
        assert self.pruner is not None
        masks, self._masks = self._masks, []
        return self.pruner.step(mask=masks or None)

    def skip(self) -> None:
        """Forget what came since the last step."""
        assert self.pruner is not None
        self._masks = []
        self.pruner.skip()


def not_whole(strategy: object) -> ValueError:
    """What to raise where parameters, or what optimizers hold of them, are in parts."""
    return ValueError(
        f"model: {strategy} puts parameters, or what the optimizer holds of them, in parts on "
        "several ranks, where no pruner can be made any more; prune in a loop of your own, as "
        "docs/distributed.md does, or let DistributedDataParallel train it"
    )


def ranks_of_all() -> Ranks | None:
    """All processes of the run, if there are several."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Ranks() if several else None


def plain_optimizers(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers themselves, out of the wrappers that Accelerate puts around them."""
    from accelerate.optimizer import AcceleratedOptimizer

    return [one.optimizer if isinstance(one, AcceleratedOptimizer) else one for one in optimizers]


def moved(inputs: Any, device: torch.device) -> Any:
    """Tensors in containers, on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: moved(value, device) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


def scalars(record: PruneRecord) -> dict[str, float]:
    """What a logger is told of a pruning."""
    return {
        "pruning/filters": record.filters_fraction,
        "pruning/params": record.params_fraction,
        "pruning/flops": record.flops_fraction,
        "pruning/removed": float(sum(map(len, record.removed.values()))),
        "pruning/threshold": record.threshold,
    }


def add_histograms(writer: Any, pruner: Pruner, step: int) -> None:
    """Give the scores of each layer's filters to a writer that takes histograms.

    Args:
        writer: a SummaryWriter of TensorBoard; another one is left alone.
        step: on its axis.
    """
    if not hasattr(writer, "add_histogram"):
        return
    for layer, score in pruner.scores().items():
        finite = score[score.isfinite()]
        if finite.numel():
            writer.add_histogram(f"pruning/scores/{layer}", finite, global_step=step)
