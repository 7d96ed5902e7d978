"""A module as a user of the command line might have it, and commands on it."""

from __future__ import annotations

import sys

import pytest

from taylor_kernels import cli

MODULE = """
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        with open("calls", "a") as file:
            file.write(".")
        return self.head(self.two(self.one(x)).mean((2, 3)))

def make_model():
    model = Net()
    model.one[0].weight.requires_grad_(False)  # frozen layers are compared too
    return model

class Branch(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x):
        return x + super().forward(x)

def residual():
    body = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), *(Branch() for _ in range(4))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

def make_loader():
    images, labels = torch.randn(60, 1, 6, 6), torch.randint(0, 4, (60,))
    return DataLoader(TensorDataset(images, labels), batch_size=12, shuffle=True)

model, pairs = make_model(), [(torch.randn(3, 1, 6, 6), torch.randint(0, 4, (3,)))]
headless, number = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), 3
nothing, single, triple = (lambda: []), (lambda: [torch.ones(3)]), (lambda: [(1, 2, 3)])
broken_loader = lambda: (1 / 0 for _ in range(3))
wide = lambda: [(torch.randn(3, 5, 6, 6), torch.randint(0, 4, (3,)))]
later_nan = lambda: pairs + [(pairs[0][0] * torch.nan, pairs[0][1])]
floats = lambda: [(torch.randn(3, 1, 6, 6), torch.randn(3))]

def regression(outputs, targets):
    return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 4).float())
def vector(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")
def detached(outputs, targets):
    return nn.functional.cross_entropy(outputs.detach(), targets)
def infinite(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) / 0
def needs_arguments(width):
    return Net()
def raises():
    raise OSError("weights.pt is not there")
def exits():
    raise SystemExit(3)
"""

MODEL_AND_DATA = ("--model", "mynets:make_model", "--data", "mynets:make_loader", "--batches", "3")
FEW = ("--criteria", "taylor_fo_bn", "--criteria", "magnitude_l2", "--criteria", "random")


def compare(capsys, *arguments: str) -> tuple[int, str, str]:
    return command(capsys, "compare", *arguments)


def command(capsys, name: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    sys.modules.pop("mynets", None)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err
