"""A training by several processes that a trainer prunes; tests run it on each of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import taylor_kernels as tk
from tests.integrations import trainer_runs as runs


def set_environment(rank: int, size: int) -> None:
    """As torchrun does."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def on_rank(rank: int, size: int, kind: str, folder: str) -> dict[str, Any]:
    """What a rank has in the end. Its process group is there already."""
    set_environment(rank, size)
    options: dict[str, Any] = {}
    if kind == "transformers":
        options = {"num_train_epochs": 3, "save_strategy": "no"}
    if kind == "lightning":
        from lightning.pytorch.plugins.environments import TorchElasticEnvironment

        options = {"strategy": "ddp", "devices": size, "plugins": [TorchElasticEnvironment()]}
    got = runs.trained(kind, Path(folder), **options)
    pruner = got.pruner
    masks = [mask.tolist() for mask in pruner.state_dict()["removed"]]
    pruner.compact()
    if kind == "transformers":
        before = pruner.model.net[0].weight.detach().clone()
        got.trainer.train()
        assert not torch.equal(pruner.model.net[0].weight, before)
    return {
        "masks": masks,
        "prunings": [(r.step, r.threshold, list(r.removed.values())) for r in pruner.history],
        "weights": {name: p.detach().clone() for name, p in pruner.model.named_parameters()},
        "widths": [m.out_channels for m in got.net.modules() if isinstance(m, nn.Conv2d)],
        "ranks": pruner.ranks is not None,
    }


def after_load(rank: int, size: int, folder: str) -> dict[str, Any]:
    """What a rank has that loads the state of a model that was cut, and trains on by itself."""
    from accelerate import Accelerator

    from taylor_kernels.integrations.accelerate import AcceleratedPruner

    set_environment(rank, size)
    images, labels = (part[rank::size] for part in runs.examples())
    found: dict[str, Any] = {}
    for loads in (False, True):
        accelerator = Accelerator(cpu=True)
        bare = runs.network()
        model, optimizer = accelerator.prepare(bare, runs.sgd(bare)[0])
        pruner = AcceleratedPruner(
            accelerator, model, images[:1], optimizer=optimizer, **runs.OPTIONS
        )
        while not pruner.done and not loads:
            accelerator.backward(cross_entropy(model(images), labels))
            pruner.step()
            optimizer.step()
            optimizer.zero_grad()
        if loads:
            accelerator.load_state(folder)
        else:
            pruner.compact()
        with pytest.raises(RuntimeError, match=r"model = tk.distributed.rewrapped\(model\)"):
            model(images)
        with torch.no_grad():
            model.eval()(images)
        model = tk.distributed.rewrapped(model.train())
        if not loads:
            accelerator.save_state(folder)
        for _ in range(3):
            accelerator.backward(cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
        found[str(loads)] = {n: p.detach().clone() for n, p in bare.named_parameters()}
    return found
