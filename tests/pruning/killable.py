"""A training run with checkpoints that test_resume kills: DIRECTORY MODEL CRITERION."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from tests.helpers import zoo

STEPS = 36


def run(directory: Path, name: str, criterion: str, steps: int = STEPS, wait: float = 0.0):
    """Train and prune for `steps` minibatches, going on from a checkpoint if there is one."""
    torch.set_num_threads(1)
    model, inputs = zoo.build(name)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-3)
    pruner = Pruner(
        model, inputs, criterion, params=0.5, every=4, per_step=0.12, optimizer=optimizer
    )
    path = directory / "run.pt"
    start = 0
    torch.manual_seed(0)
    if path.exists():
        extra = load_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
        start = extra["step"]
        torch.set_rng_state(extra["rng"])
    for step in range(start, steps):
        optimizer.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        optimizer.step()
        if step == 17:
            pruner.compact()
        if step % 3 == 1:
            save_checkpoint(
                path, model=model, optimizer=optimizer, pruner=pruner,
                step=step + 1, rng=torch.get_rng_state(),
            )  # fmt: skip
        print(step, flush=True)
        time.sleep(wait)
    return model, optimizer, pruner


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], wait=0.02)
