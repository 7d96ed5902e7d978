"""Hugging Face Transformers: a callback that prunes the model while the Trainer trains it.

    from transformers import Trainer
    from taylor_kernels.integrations.transformers import PruningCallback

    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.add_callback(PruningCallback(trainer, example_inputs, flops=0.5))
    trainer.train()

Every optimizer step is scored once, after the last backward pass that it takes.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from taylor_kernels.criteria import Criterion
from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.integrations import absent
from taylor_kernels.integrations._trainers import (
    TrainedPruner,
    add_histograms,
    not_whole,
    plain_optimizers,
    scalars,
)
from taylor_kernels.pruning import Pruner, PruneRecord

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise absent(error, "transformers", "transformers", "5.24") from error


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of a Trainer by `tk.Pruner`.

    The pruner is made when train() begins. Checkpoints of the Trainer hold its state in their
    `trainer_state.json`, and `train(resume_from_checkpoint=...)` goes on from there. At the end the
    model is compacted, with the state of `trainer.optimizer`; its scheduler stays with it, so that
    train() may be called again. The Trainer asks whether to stop after steps alone: resumed from a
    checkpoint in which the targets were reached, it trains for one step more.

    Args:
        trainer: to which the callback is added, by `trainer.add_callback`.
        example_inputs: what to trace on: a dict as its loader gives, without labels, or a tensor.
        criterion: its name, or a `Criterion`; None stands for taylor_fo_bn.
        padding: the name of the mask that the model is given ("attention_mask"): which examples, or
            tokens, count under criteria that count them.
        stop: end the training when the targets are reached.
        compact: remove what is masked at the end of train().
        options: further arguments of `tk.Pruner` (flops=, every=, ignore=, ...).

    Attributes:
        pruner: a `tk.Pruner`; None before train().

    Raises:
        ValueError: an option is one that the trainer gives (optimizer, scaler, ranks), or the
            trainer's arguments do not go together with pruning: load_best_model_at_end,
            restore_callback_states_from_checkpoint, FSDP, DeepSpeed, nn.DataParallel. In train():
            as `tk.Pruner` does.

    Example:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from taylor_kernels.integrations.transformers import PruningCallback
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(model, TrainingArguments(folder, report_to="none"))
        ...     callback = PruningCallback(trainer, torch.randn(1, 4), filters=0.5)
        >>> trainer.add_callback(callback)
    """

    def __init__(
        self,
        trainer: Trainer,
        example_inputs: Any,
        criterion: str | Criterion | None = None,
        *,
        padding: str | None = None,
        stop: bool = True,
        compact: bool = True,
        **options: Any,
    ) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise not_whole("FSDP" if trainer.is_fsdp_enabled else "DeepSpeed")
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"trainer: it uses {trainer.args.n_gpu} GPUs by nn.DataParallel, whose replicas no "
                "pruner sees; start a process for each by torchrun, or let it see one GPU alone"
            )
        if trainer.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end: the weights of an earlier step have filters that were "
                "removed since, and compact() would cut them; leave it out"
            )
        if trainer.args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint: the Trainer would make this callback "
                "anew, without its arguments; leave it out, the pruner's state is restored "
                "without it"
            )
        self._trainer = trainer
        self._trained = TrainedPruner(example_inputs, criterion, padding, options)
        self._stop, self._compact = stop, compact
        self._record: PruneRecord | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def pruner(self) -> Pruner | None:
        return self._trained.pruner

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Weights and optimizer of a checkpoint are there by now."""
        scaler = getattr(optimizer, "scaler", None)
        pruner = self._trained.begin(model, plain_optimizers([optimizer]), scaler)
        remove_all(self._handles)  # those of a training that ended early
        self._handles = [model.register_forward_pre_hook(Hook(self._on_forward), with_kwargs=True)]
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if state.global_step and saved is not None and saved["attributes"]["pruner"]:
            pruner.load_state_dict(_decoded(saved["attributes"]["pruner"]))
            control.should_training_stop = pruner.done and self._stop
        state.stateful_callbacks[name] = self.state()  # the Trainer writes where a name is known

    def _on_forward(self, model: nn.Module, args: tuple, batch: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._trained.note(batch)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the last backward pass of an accumulation, and after clipping."""
        self._record = self._trained.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        pruner = self.pruner
        assert pruner is not None
        if (record := self._record) is not None:
            self._record = None
            due = control.should_log
            self._trainer.log(scalars(record))
            control.should_log = due  # logging has put it back, and the loss would not be logged
            for callback in self._trainer.callback_handler.callbacks:
                writer = getattr(callback, "tb_writer", None)
                add_histograms(writer, pruner, state.global_step)
            control.should_training_stop |= record.done and self._stop
        self._before_saving(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._before_saving(control)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """All checkpoints of the training have been written by now."""
        remove_all(self._handles)
        if self.pruner is None:
            return
        self.pruner.sync()
        if self._compact:
            self.pruner.compact()
        # DDP keeps the parameters that it was made with, and train() would take the same DDP again.
        self._trainer.model_wrapped = self._trainer.model

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`; called on the rank that writes."""
        saved = None if self.pruner is None else _encoded(self.pruner.state_dict())
        return {"args": {}, "attributes": {"pruner": saved}}

    def _before_saving(self, control: TrainerControl) -> None:
        """Whether a checkpoint is written may be found in an evaluation."""
        if control.should_save or control.should_evaluate:
            assert self.pruner is not None
            self.pruner.sync()


def _encoded(state: dict[str, Any]) -> str:
    """A state as text, since the Trainer keeps callbacks in JSON."""
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode()


def _decoded(text: str) -> dict[str, Any]:
    file = io.BytesIO(base64.b64decode(text))
    return torch.load(file, map_location="cpu", weights_only=True)
