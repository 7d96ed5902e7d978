"""What trainers' own loggers are told of pruning; and what a callback refuses, in one message."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.integrations import trainer_runs as runs
from tests.integrations.conftest import library
from tests.integrations.trainer_runs import KINDS, Trained, trained

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerator"),
    pytest.mark.filterwarnings("ignore"),
]


class Recorder:
    """A writer of TensorBoard's, by its methods."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.histograms: dict[str, list[tuple[int, Tensor]]] = {}

    def add_scalars(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if name.startswith("pruning/"):
                self.scalars.setdefault(name, []).append((step, value))

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> None:
        self.histograms.setdefault(tag, []).append((global_step, values))


def logged_by_lightning(folder: Path, writer: Recorder) -> Trained:
    from lightning.pytorch.loggers import CSVLogger, Logger

    class Records(Logger):
        name, version, experiment = "records", "0", writer

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            writer.add_scalars(metrics, step or 0)

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    return trained("lightning", folder, logger=[Records(), CSVLogger(folder)])


def logged_by_transformers(folder: Path, writer: Recorder) -> Trained:
    from transformers import TrainerCallback

    class Records(TrainerCallback):
        tb_writer = writer

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            writer.add_scalars(logs, state.global_step)

    return trained("transformers", folder, callbacks=[Records()])


def logged_by_accelerate(folder: Path, writer: Recorder) -> Trained:
    from accelerate.tracking import GeneralTracker

    class Records(GeneralTracker):
        name, requires_logging_directory, tracker = "records", False, writer

        def store_init_configuration(self, values: Any) -> None: ...

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            writer.add_scalars(values, step or 0)

    return trained("accelerate", folder, log_with=[Records()])


LOGGED = {
    "lightning": logged_by_lightning,
    "transformers": logged_by_transformers,
    "accelerate": logged_by_accelerate,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainers_logger_is_told_of_every_pruning(kind, tmp_path):
    library(kind)
    writer = Recorder()
    pruner = LOGGED[kind](tmp_path, writer).pruner
    for name in ("filters", "params", "flops"):
        logged = [value for _, value in writer.scalars[f"pruning/{name}"]]
        assert logged == [getattr(record, f"{name}_fraction") for record in pruner.history]
    removed = [value for _, value in writer.scalars["pruning/removed"]]
    assert removed == [len(sum(record.removed.values(), ())) for record in pruner.history]
    first, *_, (step, last) = writer.histograms["pruning/scores/" + conv(kind)]
    assert len(first[1]) <= 12
    assert step == writer.scalars["pruning/flops"][-1][0]
    left = pruner.scores()[conv(kind)] if kind == "accelerate" else None
    if left is not None:  # the others have been compacted since
        assert torch.equal(last, left[left.isfinite()])
    if kind == "lightning":
        (path,) = tmp_path.rglob("metrics.csv")
        rows = list(csv.DictReader(path.open()))
        assert [float(row["pruning/flops"]) for row in rows] == [
            record.flops_fraction for record in pruner.history
        ]


def conv(kind: str) -> str:
    return "0" if kind == "accelerate" else "net.0"


def events(folder: Path) -> tuple[set[str], set[str]]:
    """The tags of scalars and of histograms in TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    found: tuple[set[str], set[str]] = set(), set()
    for path in folder.rglob("events.out.tfevents*"):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            for value in Event.FromString(data[12 : 12 + size]).summary.value:
                found[value.HasField("histo")].add(value.tag)
            data = data[16 + size :]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard(kind, tmp_path, monkeypatch):
    library("tensorboardX")
    library(kind)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    if kind == "lightning":
        from lightning.pytorch.loggers import TensorBoardLogger

        options: dict[str, Any] = {"logger": TensorBoardLogger(str(tmp_path))}
    elif kind == "transformers":
        options = {"report_to": "tensorboard"}
    else:
        options = {"log_with": "tensorboard", "project_dir": str(tmp_path)}
    end = trained(kind, tmp_path, **options)
    if kind == "accelerate":
        end.trainer.end_training()
    scalars, histograms = events(tmp_path)
    prefix = "train/" if kind == "transformers" else ""
    assert {f"{prefix}pruning/flops", f"{prefix}pruning/threshold"} <= scalars
    assert f"pruning/scores/{conv(kind)}" in histograms


def test_what_lightning_saves_after_the_end_is_the_compacted_model(tmp_path):
    got = trained("lightning", tmp_path)
    got.trainer.save_checkpoint(tmp_path / "end.ckpt")
    weights = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert weights["net.0.weight"].shape == got.net[0].weight.shape
    with pytest.raises(ValueError, match=r"ckpt_path: net\..* load it into .* tk\.load_pruned"):
        trained("lightning", tmp_path, resume=str(tmp_path / "end.ckpt"))
    tk.save_pruned(tmp_path / "pruned.safetensors", got.pruner)


def test_compact_and_stop_can_be_left_to_oneself(tmp_path):
    options = {"pruning": {"stop": False, "compact": False}, "max_epochs": 4}
    got = trained("lightning", tmp_path, **options)
    assert got.pruner.done
    assert got.trainer.global_step == 12 > got.pruner.history[-1].step
    assert got.net[0].out_channels == 12
    got.trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["PruningCallback"]
    assert state["pruner"]["steps"] == 8
    got.pruner.compact()
    assert got.net[0].out_channels < 12


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
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
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
