"""Tracing a model beside one forward pass of it, batch 1: the ratio is what a user waits for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bench.harness import Provider
from bench.models import ConvNet, resnet18, resnet50
from taylor_kernels.tracing import trace

OURS, FORWARD = "trace", "forward"
#: Network -> how to make it, and the side of its images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, 224),
    "resnet50": (resnet50, 224),
    "convnet": (ConvNet, 32),
}
ROUNDS = 9


def providers(network: str, device: torch.device) -> list[Provider]:
    make, side = NETWORKS[network]
    model = make().to(device).eval()
    x = torch.randn(1, 3, side, side, device=device)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]

    def check(channels: object) -> float:
        assert list(getattr(channels, "skipped", {})) == [last]
        return 0.0

    return [
        Provider(FORWARD, lambda: torch.no_grad()(model)(x), role="floor"),
        Provider(OURS, lambda: trace(model, x), check, "ours"),
    ]


@pytest.mark.quick(network=["convnet"])
@pytest.mark.parametrize("provider", [FORWARD, OURS])
@pytest.mark.parametrize("network", list(NETWORKS))
def bench_tracing(network, provider, device, measured, record, rounds) -> None:
    case = ("tracing", network, "batch 1")
    record(
        case,
        measured.get(case, lambda: providers(network, device), rounds(ROUNDS), keep_busy=False),
        provider,
    )
