"""What trainers' own loggers are told of pruning."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
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
