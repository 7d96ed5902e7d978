"""Lightning: a callback that prunes the model while the trainer trains it.

    from lightning.pytorch import Trainer
    from taylor_kernels.integrations.lightning import PruningCallback

    trainer = Trainer(callbacks=[PruningCallback(example_inputs, flops=0.5)])
    trainer.fit(module, loader)

Every optimizer step is scored once, after the last backward pass that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from taylor_kernels.criteria import Criterion
from taylor_kernels.hooks import remove_all
from taylor_kernels.integrations import absent
from taylor_kernels.integrations._trainers import (
    TrainedPruner,
    add_histograms,
    not_whole,
    scalars,
)
from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.removing.optimizer_state import as_list

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    raise absent(error, "lightning", "lightning", "2.6.6") from error


class PruningCallback(Callback):
    """Prunes a LightningModule, or a part of it, by `tk.Pruner`.

    The pruner is made when fit() begins. Checkpoints of the trainer hold its state, and
    `fit(ckpt_path=...)` goes on from there. After fit() the model is compacted, with the state of
    `trainer.optimizers`; schedulers stay with them.

    Args:
        example_inputs: what to trace on; None stands for the module's `example_input_array`.
        criterion: its name, or a `Criterion`; None stands for taylor_fo_bn.
        model: the name of the part to prune ("net"); None stands for the whole module, whose
            forward() is traced then.
        padding: the name of the mask in a batch that is a dict ("attention_mask"): which examples,
            or tokens, count under criteria that count them.
        stop: end the training when the targets are reached.
        compact: remove what is masked at the end of fit().
        options: further arguments of `tk.Pruner` (flops=, every=, ignore=, ...).

    Attributes:
        pruner: a `tk.Pruner`; None before fit().

    Raises:
        ValueError: an option is one that the trainer gives (optimizer, scaler, ranks). In fit():
            there is no such part; several optimizers train it; the strategy puts parameters in
            parts; the checkpoint was saved after compact(); or as `tk.Pruner` does.

    Example:
        >>> from taylor_kernels.integrations.lightning import PruningCallback
        >>> callback = PruningCallback(model="net", flops=0.5, every=20)
        >>> print(callback.pruner)
        None
    """

    def __init__(
        self,
        example_inputs: Any = None,
        criterion: str | Criterion | None = None,
        *,
        model: str | None = None,
        padding: str | None = None,
        stop: bool = True,
        compact: bool = True,
        **options: Any,
    ) -> None:
        self._trained = TrainedPruner(example_inputs, criterion, padding, options)
        self._name, self._stop, self._compact = model, stop, compact
        self._saved: dict[str, Any] | None = None
        self._batch: Any = None
        self._passed = False  # a backward pass has, since the last step
        self._handles: list[RemovableHandle] = []

    @property
    def pruner(self) -> Pruner | None:
        return self._trained.pruner

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The weights of a checkpoint come next."""
        remove_all(self._handles)  # those of a fit() that failed there
        if stage == "fit":
            self._handles = [pl_module.register_load_state_dict_pre_hook(_check_whole)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights of a checkpoint are there by now, and its optimizers' state is not."""
        remove_all(self._handles)
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise not_whole(type(trainer.strategy).__name__)
        model = self._part(pl_module)
        held = set(model.parameters())
        optimizers = [
            one
            for one in trainer.optimizers
            if any(p in held for group in one.param_groups for p in group["params"])
        ]
        if len(optimizers) != 1:
            raise ValueError(
                f"model: {len(optimizers)} optimizers of the trainer train it, and a step of one "
                "is a minibatch to the pruner; call tk.Pruner in training_step() yourself"
            )
        if self._trained.example_inputs is None:
            self._trained.example_inputs = _inputs_of(pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        pruner = self._trained.begin(model, optimizers, scaler)
        if self._saved is not None:
            pruner.load_state_dict(self._saved)
            self._saved = None
            trainer.should_stop = pruner.done and self._stop

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not called where training_step() has left a batch out."""
        self._passed = True
        self._trained.note(self._batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """After the last backward pass of an accumulation and unscale_(), before clipping."""
        pruner = self.pruner
        assert pruner is not None
        mine = any(optimizer is one for one in as_list(pruner.optimizer))
        found = (p.grad for p in pruner.model.parameters() if p.grad is not None)
        passed, self._passed = self._passed, self._passed and not mine
        # Whether there is a gradient is known by the first one; their values are seldom looked at.
        if not (any(map(Tensor.any, found)) if mine and not passed else any(True for _ in found)):
            # training_step() has left all batches of this step out, or toggle_optimizer() the model
            # out of a pass that was for another optimizer.
            self._passed = False
            self._trained.skip()
            return
        if not mine:
            return
        if record := self._trained.step():
            for logger in trainer.loggers:
                logger.log_metrics(scalars(record), step=trainer.global_step)
                add_histograms(getattr(logger, "experiment", None), pruner, trainer.global_step)
            trainer.should_stop |= record.done and self._stop

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All checkpoints of the training have been written by now."""
        self._batch = None
        if self._compact and self.pruner is not None:
            self.pruner.compact()

    def state_dict(self) -> dict[str, Any]:
        """Called on all ranks."""
        if self.pruner is None:
            return {}
        self.pruner.sync()
        return {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["pruner"]

    def _part(self, module: LightningModule) -> nn.Module:
        if self._name is None:
            return module
        try:
            return module.get_submodule(self._name)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.named_children())
            raise ValueError(
                f"model: {type(module).__name__} has no part {self._name!r}; it has {names}"
            ) from error


def _check_whole(module: nn.Module, state: Mapping[str, Any], *_: object) -> None:
    """The weights that a checkpoint holds are those of the whole model."""
    for name, parameter in module.named_parameters():
        if name in state and state[name].numel() < parameter.numel():
            raise ValueError(
                f"ckpt_path: {name} has shape {tuple(state[name].shape)} in it and "
                f"{tuple(parameter.shape)} here; if it was saved after compact(), load it into a "
                "model that tk.load_pruned has cut, without this callback"
            )


def _inputs_of(module: LightningModule) -> Any:
    found = module.example_input_array
    if found is None:
        raise ValueError(
            "example_inputs: give what forward() takes, or set example_input_array in the module"
        )
    return found
