"""Importances of Avalanche's EWC over a set of images: its own plugin, and the drop-in one.

    mlp        64-100-2 on 8×8 digits, 256 of them, as of bench/continual.py
    convnet    the ConvNet of bench/models.py, 64 images of 32²
    resnet18   ResNet-18, 64 images of 32²

"Avalanche, batch size 1" has the answer that all are held against; at batch size 32 it has another,
and is shown for its time. Everybody reads the same images at batch size 32 but for that one.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.harness import Provider
from bench.models import ConvNet, resnet18
from tests.helpers.stubs import OF_AVALANCHE, stubs_of

if importlib.util.find_spec("avalanche") is None:
    pytest.skip("avalanche-lib is not installed", allow_module_level=True)
with stubs_of(OF_AVALANCHE):
    from avalanche.training.plugins import EWCPlugin as Theirs

    from taylor_kernels.integrations.avalanche import EWCPlugin as Ours

BATCH = 32
OURS, ONE, THEIRS = "ours", "Avalanche, batch size 1", "Avalanche, batch size 32"
#: Rounds of ours, and of one image at a time.
ROUNDS = {"mlp": (15, 3), "convnet": (5, 2), "resnet18": (5, 1)}
#: Distance of all importances from those of single examples, over their norm.
TOLERANCE = 1e-4


def problem(kind: str) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 2))
        x, classes = torch.rand(256, 64), 2
    else:
        model, classes = (ConvNet() if kind == "convnet" else resnet18()), 10
        x = torch.randn(64, 3, 32, 32)
        with torch.no_grad():
            model(x)  # running statistics
    zero = torch.zeros(len(x), dtype=torch.int64)
    return model, TensorDataset(x, torch.randint(0, classes, (len(x),)), zero)


def _values(importances: dict[str, Any]) -> Tensor:
    return torch.cat([value.data.flatten().double() for value in importances.values()])


def providers(kind: str, device: torch.device) -> list[Provider]:
    original, data = problem(kind)
    criterion, want = nn.CrossEntropyLoss(), torch.empty(0)

    def way(plugin: Any, batch_size: int) -> Callable[[], dict[str, Any]]:
        model = copy.deepcopy(original).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        arguments = (model, criterion, optimizer, data, device, batch_size)
        return lambda: plugin(1.0).compute_importances(*arguments)

    one = way(Theirs, 1)
    want = _values(one())

    def check(found: dict[str, Any]) -> float:
        distance = float((_values(found) - want).norm() / want.norm())
        assert distance <= TOLERANCE, f"off by {distance:.1e} of the norm"
        return distance

    return [
        Provider(OURS, way(Ours, BATCH), check, "ours", "avalanche"),
        Provider(ONE, one, check, "peer", "avalanche", rounds=ROUNDS[kind][1]),
        Provider(THEIRS, way(Theirs, BATCH), None, "extra", "avalanche"),
    ]


@pytest.mark.quick(kind=["mlp"])
@pytest.mark.parametrize("provider", [OURS, ONE, THEIRS])
@pytest.mark.parametrize("kind", list(ROUNDS))
def bench_avalanche(kind, provider, device, measured, record, rounds) -> None:
    case = ("avalanche", kind)
    results = measured.get(case, lambda: providers(kind, device), rounds(ROUNDS[kind][0]))
    record(case, results, provider)
