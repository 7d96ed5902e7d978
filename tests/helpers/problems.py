"""A small classifier that has learned something, and its data: what is compared in the tests."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from taylor_kernels.studies.oracle.problem import Problem, inner_layers
from taylor_kernels.studies.progress import ProgressLog

#: The layers that are compared, and how many filters they have.
WIDTHS = {"0": 8, "3": 9, "8": 7}


class Counted:
    """Cross-entropy that counts its calls, and can stop at one of them as Ctrl-C would."""

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)


def small_problem(loss=F.cross_entropy, *, trained: bool = True) -> Problem:
    """Eighty images of four classes in float32; a gate behind BatchNorm, one before a ReLU in
    place, one on a linear layer."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 9, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Identity()),
        *(nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 4)),
    )
    labels = torch.arange(80) % 4
    images = torch.randn(80, 1, 6, 6)
    images[torch.arange(80), 0, labels] += 2.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40 if trained else 0):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.zero_grad()
    batches = list(zip(images.split(20), labels.split(20), strict=True))
    layers, _ = inner_layers(model.eval(), images[:2])
    return Problem("small", model, layers, batches, batches, batches, loss, classifies=True)


def other_loss(problem: Problem, loss) -> Problem:
    return replace(problem, loss=loss)


def quiet() -> ProgressLog:
    return ProgressLog(Console(file=io.StringIO()))
