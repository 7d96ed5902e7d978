"""A training by several processes that a trainer prunes; tests run it on each of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.integrations import trainer_runs as runs


def on_rank(rank: int, size: int, kind: str, folder: str) -> dict[str, Any]:
    """What a rank has in the end. Its process group is there already."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
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
