"""Training a language model by AdamW, and what a byte costs it on text that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.studies.language.text import random_windows

#: Windows that are judged at once.
_CHUNK = 8


@dataclass(frozen=True)
class Schedule:
    """AdamW; the learning rate rises to `lr` over the first tenth and falls to 0 by a cosine."""

    steps: int
    lr: float
    windows: int = 4
    length: int = 256
    weight_decay: float = 0.1


def byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of each byte of the windows but the first."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def minibatches(data: Tensor, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Windows [windows, length + 1] without end, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield random_windows(data, schedule.windows, schedule.length + 1, generator)


def train(
    model: nn.Module,
    data: Tensor,
    schedule: Schedule,
    *,
    seed: int,
    on_step: Callable[[str], None] = lambda note: None,
) -> None:
    """Train a model in place, with a new optimizer; norms are not decayed.

    Args:
        data: [bytes] uint8.
        seed: of the order of the windows.
        on_step: called after each step with a short note.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95))
    model.train()
    windows = minibatches(data, schedule, seed)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * _share_of_rate(step, schedule.steps)
        optimizer.zero_grad()
        loss = byte_loss(model, next(windows))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_step(f"{loss.item() / math.log(2):.2f} bits a byte")


def _share_of_rate(step: int, steps: int) -> float:
    rising = math.ceil(steps / 10)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """The mean cross-entropy of a byte in bits, in eval mode; 2 to it is the perplexity."""
    training = model.training
    model.eval()
    total = sum(byte_loss(model, part).item() * len(part) for part in windows.split(_CHUNK))
    model.train(training)
    return total / len(windows) / math.log(2)
