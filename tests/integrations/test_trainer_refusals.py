"""What a callback in a trainer refuses, in one message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations import trainer_runs as runs
from tests.integrations.conftest import library


def lightning_module(optimizers: int = 1, example: bool = True) -> Any:
    from lightning import pytorch

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = optimizers == 1
            self.net = runs.network()
            if example:
                self.example_input_array = runs.examples()[0][:1]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            parts = list(self.net.parameters())
            return [torch.optim.SGD(parts[i::optimizers], lr=0.1) for i in range(optimizers)]

    return Module()


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        ({}, {"model": "nett"}, r"model: Module has no part 'nett'; it has net"),
        ({"optimizers": 2}, {}, r"model: 2 optimizers of the trainer train it"),
        ({"example": False}, {}, r"example_inputs: give what forward\(\) takes"),
        ({}, {"criterion": "taylor_so_diag"}, r"criterion: 'taylor_so_diag' runs the model itself"),
        ({}, {"padding": "mask"}, r"padding: the batch has no tensor 'mask'"),
    ],
)
def test_what_lightning_cannot_prune_is_one_clear_error(module, options, said):
    library("lightning")
    from lightning import pytorch

    from taylor_kernels.integrations.lightning import PruningCallback

    made = lightning_module(**module)
    trainer = pytorch.Trainer(
        **runs.QUIET,
        callbacks=[PruningCallback(**runs.OPTIONS | options)],
    )
    before = [p.detach().clone() for p in made.parameters()]
    with pytest.raises(ValueError, match=said):
        trainer.fit(made, runs.loader())
    assert all(map(torch.equal, made.parameters(), before))


@pytest.mark.parametrize("name", ["optimizer", "scaler", "ranks", "model"])
def test_what_the_trainer_gives_is_left_out(name):
    library("lightning")
    from taylor_kernels.integrations._trainers import TrainedPruner

    with pytest.raises(ValueError, match=f"^{name}: the trainer gives it"):
        TrainedPruner(None, None, None, {name: None})


@pytest.mark.parametrize(
    "argument", ["load_best_model_at_end", "restore_callback_states_from_checkpoint"]
)
def test_arguments_of_the_trainer_that_would_spoil_it(argument, tmp_path):
    library("transformers")
    from transformers import Trainer, TrainingArguments

    from taylor_kernels.integrations.transformers import PruningCallback

    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, **steps, **{argument: True}
    )
    trainer = Trainer(nn.Linear(2, 2), arguments, eval_dataset=[{}])
    with pytest.raises(ValueError, match=f"^{argument}: .*leave it out"):
        PruningCallback(trainer, torch.randn(1, 2), filters=0.5)


def test_replicas_are_one_clear_error(tmp_path):
    library("transformers")
    from transformers import Trainer, TrainingArguments

    from taylor_kernels.integrations.transformers import PruningCallback

    trainer = Trainer(
        nn.Linear(2, 2), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    )
    trainer.args._n_gpu = 2  # as on a machine that has two
    with pytest.raises(ValueError, match=r"uses 2 GPUs by nn\.DataParallel.*by torchrun"):
        PruningCallback(trainer, torch.randn(1, 2), filters=0.5)


def test_a_folder_without_the_pruner_is_said_to_be_one(tmp_path):
    library("accelerate")
    from accelerate import Accelerator

    from taylor_kernels.integrations.accelerate import AcceleratedPruner

    accelerator = Accelerator(cpu=True)
    bare = runs.network()
    model, optimizer = accelerator.prepare(bare, runs.sgd(bare)[0])
    accelerator.save_state(str(tmp_path / "before"))
    AcceleratedPruner(
        accelerator, model, runs.examples()[0][:1], optimizer=optimizer, **runs.OPTIONS
    )
    with pytest.raises(FileNotFoundError, match=r"there is no pruner\.pt in .*after load_state"):
        accelerator.load_state(str(tmp_path / "before"))


def test_sharded_parameters_are_one_clear_error(tmp_path):
    library("accelerate")
    from accelerate import Accelerator, DistributedType

    from taylor_kernels.integrations.accelerate import AcceleratedPruner

    accelerator = Accelerator(cpu=True)
    model = runs.network()
    optimizer, _ = runs.sgd(model)
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match=r"model: FSDP puts parameters.* in parts.*of your own"):
        AcceleratedPruner(
            accelerator, model, runs.examples()[0][:1], optimizer=optimizer, **runs.OPTIONS
        )
