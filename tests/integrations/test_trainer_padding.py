"""Padding in the batches of a trainer, and the masks that say where it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taylor_kernels as tk
from tests.integrations.conftest import library
from tests.integrations.trainer_runs import QUIET


class Tokens(nn.Module):
    """Classifies every token: layers are given all tokens in dim 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.body(x.flatten(0, 1))
        if labels is None:
            return {"logits": logits}
        return {
            "loss": cross_entropy(logits, labels.flatten(), ignore_index=-100),
            "logits": logits,
        }


def sentences() -> list[dict[str, Tensor]]:
    """Of one to five tokens, padded to five."""
    torch.manual_seed(6)
    made = []
    for n in (5, 1, 2, 4, 1, 1, 3, 5):
        mask = (torch.arange(5) < n).long()
        labels = torch.where(mask > 0, torch.randint(3, (5,)), -100)
        made.append({"x": torch.randn(5, 6), "mask": mask, "labels": labels})
    return made


def test_what_is_skipped_takes_its_masks_along():
    """And a name is one pruner's alone."""
    library("accelerate")
    from accelerate import Accelerator

    from taylor_kernels.integrations.accelerate import AcceleratedPruner

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = Tokens(), sentences()
    accelerated, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    options: dict[str, Any] = {"optimizer": optimizer, "filters": 0.5, "every": 1, "per_step": 1}
    pruner = AcceleratedPruner(
        accelerator, accelerated, data[0]["x"][None], "taylor_fo_gate", **options
    )
    with pytest.raises(ValueError, match="name: the accelerator has a pruner 'pruner'"):
        AcceleratedPruner(accelerator, accelerated, data[0]["x"][None], **options)
    records = []
    for number, sentence in enumerate(data[:3]):
        batch = {name: value[None] for name, value in sentence.items()}
        with accelerator.accumulate(accelerated):
            accelerator.backward(accelerated(**batch)["loss"])
            records.append(pruner.step(mask=batch["mask"]))
            if number == 0:
                pruner.skip()
    assert [record is None for record in records] == [True, False, True]
    assert len(pruner._masks) == 1


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_padding_of_batches_does_not_count(kind, tmp_path):
    """Two batches of two sentences are accumulated; only the tokens that there are count."""
    library(kind)
    data, options = sentences(), {"filters": 0.7, "every": 1, "per_step": 1}
    model = Tokens()
    imp = tk.Importance(model, "taylor_fo_gate")
    got = []
    for padding in (None, "mask"):
        made = Tokens()
        if kind == "lightning":
            pruner = tokens_in_lightning(made, data, padding, options)
        else:
            pruner = tokens_in_transformers(made, data, padding, options, tmp_path)
        got.append(pruner.history[0].threshold)
    for part in (data[:2], data[2:4]):
        there = [sentence["mask"] > 0 for sentence in part]
        x = torch.cat([s["x"][m] for s, m in zip(part, there, strict=True)])
        y = torch.cat([s["labels"][m] for s, m in zip(part, there, strict=True)])
        (cross_entropy(model(x[None])["logits"], y) / 2).backward()
    imp.update()
    expected = imp.compute()["body.0"].min().item()
    assert math.isclose(got[1], expected, rel_tol=1e-4)
    assert not math.isclose(got[0], expected, rel_tol=0.1)


def tokens_in_lightning(model: Tokens, data: list, padding: str | None, options: dict) -> tk.Pruner:
    from lightning import pytorch
    from torch.utils.data import DataLoader

    from taylor_kernels.integrations.lightning import PruningCallback

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = PruningCallback(
        data[0]["x"][None], "taylor_fo_gate", model="net", padding=padding, **options
    )
    trainer = pytorch.Trainer(
        **QUIET,
        max_steps=1,
        accumulate_grad_batches=2,
        callbacks=[callback],
    )
    trainer.fit(Module(), DataLoader(data, 2))
    assert callback.pruner is not None
    return callback.pruner


def tokens_in_transformers(
    model: Tokens, data: list, padding: str | None, options: dict, folder: Path
) -> tk.Pruner:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from taylor_kernels.integrations.transformers import PruningCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(data)

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        save_strategy="no",
    )
    trainer = InOrder(model, arguments, train_dataset=data)
    callback = PruningCallback(
        trainer, data[0]["x"][None], "taylor_fo_gate", padding=padding, **options
    )
    trainer.add_callback(callback)
    trainer.train()
    assert callback.pruner is not None
    return callback.pruner
