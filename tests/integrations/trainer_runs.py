"""Small trainings by Lightning, Transformers and Accelerate that tests prune, kill and resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import taylor_kernels as tk
from tests.integrations.conftest import library

#: Of `tk.Pruner`, in all runs: it is done after a few prunings.
OPTIONS: dict[str, Any] = {"filters": 0.5, "every": 2, "per_step": 3}
#: Of a Lightning trainer that leaves no files and prints nothing.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
KINDS = ("lightning", "transformers", "accelerate")
BATCH, BATCHES, ACCUMULATED, EPOCHS = 6, 5, 2, 7


def network(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    between = nn.BatchNorm2d if norm else lambda width: nn.Identity()
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), between(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3), between(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def examples() -> tuple[Tensor, Tensor]:
    """The last batch of an epoch is smaller, and so is its last accumulation."""
    torch.manual_seed(4)
    count = BATCH * BATCHES - 2
    return torch.randn(count, 3, 8, 8), torch.randint(4, (count,))


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*examples()), BATCH)


def sgd(model: nn.Module) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)


def kill() -> None:
    """As a machine does that is switched off."""
    os.kill(os.getpid(), signal.SIGKILL)


def lightning(folder: Path, *, kill_at: int | None = None, resume: str | None = None, **options):
    """Returns the trainer, the module and the callback."""
    from lightning import pytorch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from taylor_kernels.integrations.lightning import PruningCallback

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.example_input_array = examples()[0][:1]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if self.global_step == kill_at:
                kill()
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer, scheduler = sgd(self)
            return [optimizer], [scheduler]

    callback = PruningCallback(**OPTIONS | options.pop("pruning", {}))
    if (scaler := options.pop("scaler", None)) is not None:
        options["plugins"] = [pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "accumulate_grad_batches": ACCUMULATED,
        "max_epochs": EPOCHS,
        "callbacks": [callback, saves, *options.pop("callbacks", ())],
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch.Trainer(**settings | quiet | options)
    module = Module()
    trainer.fit(module, loader(), ckpt_path=resume)
    return trainer, module, callback


class Classifier(nn.Module):
    """A model as the Trainer of Transformers takes it: a dict in, the loss and more out."""

    def __init__(self, kill_at: int | None) -> None:
        super().__init__()
        self.net = network()
        self.kill_at = kill_at
        self.seen: list[tuple[Tensor, Tensor]] = []  # the batches of training, in their order

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(images)
        if labels is None:
            return {"logits": logits}
        if len(self.seen) == self.kill_at:
            kill()
        self.seen.append((images, labels))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def transformers(folder: Path, *, kill_at: int | None = None, resume: bool = False, **options: Any):
    """Returns the trainer, the model and the callback; `kill_at` counts minibatches."""
    from transformers import Trainer, TrainingArguments

    from taylor_kernels.integrations.transformers import PruningCallback

    images, labels = examples()
    scaler = options.pop("scaler", None)
    pruning, callbacks = options.pop("pruning", {}), options.pop("callbacks", [])
    settings = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "num_train_epochs": EPOCHS,
        "save_steps": 4,
        "logging_steps": 5,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    model = Classifier(kill_at)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **settings | options),
        train_dataset=[{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)],
        optimizers=sgd(model),
        callbacks=callbacks,
    )
    callback = PruningCallback(trainer, {"images": images[:1]}, **OPTIONS | pruning)
    trainer.add_callback(callback)
    trainer.accelerator.scaler = scaler  # which it makes itself where there is a GPU
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model, callback


class Count:
    """Minibatches so far; the accelerator saves it with the run."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def accelerate(
    folder: Path,
    *,
    kill_at: int | None = None,
    resume: bool = False,
    compact_at: int | None = None,
    pruning: dict[str, Any] = {},  # noqa: B006 - not written to
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
):
    """Returns the accelerator, the model, the pruner, the optimizer and the scheduler."""
    from accelerate import Accelerator

    from taylor_kernels.integrations.accelerate import AcceleratedPruner

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **options)
    accelerator.scaler = scaler  # which it makes itself where there is a GPU
    accelerator.init_trackers("run")
    bare = network()
    model, optimizer, scheduler, data = accelerator.prepare(bare, *sgd(bare), loader())
    pruner = AcceleratedPruner(
        accelerator, model, examples()[0][:1], optimizer=optimizer, **OPTIONS | pruning
    )
    count = Count()
    accelerator.register_for_checkpointing(count)
    if resume:
        accelerator.load_state(str(folder / "run"))
    while not pruner.done:
        for x, y in accelerator.skip_first_batches(data, count.value % len(data)):
            if count.value == kill_at:
                kill()
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                pruner.step()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            count.value += 1
            if count.value == compact_at:
                pruner.compact()
            if count.value % len(data) == 2:
                accelerator.save_state(str(folder / "run"))
            if pruner.done:
                break
    return accelerator, model, pruner, optimizer, scheduler


class Trained(NamedTuple):
    """What is left of a training, whoever ran it."""

    net: nn.Module
    pruner: tk.Pruner
    optimizer: torch.optim.Optimizer
    scheduler: Any
    trainer: Any


def trained(kind: str, folder: Path, **options: Any) -> Trained:
    library(kind)
    made = globals()[kind](folder, **options)
    if kind == "accelerate":
        accelerator, model, pruner, optimizer, scheduler = made
        return Trained(model, pruner, optimizer.optimizer, scheduler.scheduler, accelerator)
    trainer, model, callback = made
    if kind == "lightning":
        optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    else:
        optimizer, scheduler = trainer.optimizer.optimizer, trainer.lr_scheduler
    return Trained(model.net, callback.pruner, optimizer, scheduler, trainer)
