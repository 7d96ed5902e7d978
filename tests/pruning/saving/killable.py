"""A training run with checkpoints, and one that is killed amid it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from taylor_kernels.pruning import Pruner, load_checkpoint, save_checkpoint
from tests.helpers import zoo

STEPS = 36


def run(directory: Path, name: str, criterion: str, after: Callable[[], object] = lambda: None):
    """Train and prune for STEPS minibatches, going on from a checkpoint if there is one; `after` is
    called after each."""
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
    for step in range(start, STEPS):
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
        after()
    return model, optimizer, pruner


def run_until_killed(directory: str, name: str, criterion: str) -> None:
    """As `run`; this process is killed after some step, at any point within the next one, a
    checkpoint included, unless the run has ended by then."""
    left = iter(range(random.randint(3, 12), -1, -1))
    kill = threading.Timer(random.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGKILL))
    kill.daemon = True

    def after() -> None:
        if next(left, None) == 0:
            kill.start()
        time.sleep(0.02)

    run(Path(directory), name, criterion, after)
