"""Methods on a GPU, whole steps of them: what a CPU gives, by the CUDA and the Triton kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.methods import SPP, FilterGSM, MirrorDescent, at_init
from tests.helpers.graphs import NEEDS_GPU

pytestmark = NEEDS_GPU
DEVICE = "cuda"


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(64, 5),
    )


def both(steps: Callable[[nn.Module, torch.Tensor, torch.Tensor], object]) -> list[list]:
    """State dicts of one network that a CPU and a GPU have trained, without TF32."""
    model = network()
    images, labels = torch.randn(32, 2, 6, 6), torch.randint(0, 5, (32,))
    found = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in ("cpu", DEVICE):
            net = copy.deepcopy(model).to(device)
            steps(net, images.to(device), labels.to(device))
            found.append([value.cpu() for value in net.state_dict().values()])
    return found


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, images, labels, steps: int = 2):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def same(found: list[list], rtol: float = 1e-3, atol: float = 1e-4) -> None:
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_filters_that_decay(backend):
    def steps(net, images, labels):
        on = backend if images.is_cuda else None
        trained(net, FilterGSM(net, images, lr=0.05, compression=2, backend=on), images, labels)

    same(both(steps))


@pytest.mark.parametrize("method", ["md-tanh-s", "md-softmax-s", "md-tanh", "binaryconnect"])
def test_mirror_descent(method):
    def steps(net, images, labels):
        optimizer = MirrorDescent(net.parameters(), 0.01, method=method, optimizer="sgd")
        trained(net, optimizer, images, labels)

    same(both(steps))


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "magnitude"])
def test_masks_of_new_networks(criterion):
    """Scores are sums in another order, so a few weights at the threshold may change places."""
    masks = []

    def steps(net, images, labels):
        masks.append(at_init(net, criterion, 0.3, [(images, labels)], F.cross_entropy, rounds=1))

    with torch.random.fork_rng():
        both(steps)
    on_cpu, on_gpu = masks
    total = sum(mask.numel() for mask in on_cpu.values())
    differ = sum(int((mask != on_gpu[name].cpu()).sum()) for name, mask in on_cpu.items())
    assert all(mask.is_cuda for mask in on_gpu.values()) or DEVICE == "cpu"
    assert differ <= total // 200
    assert sum(int(mask.sum()) for mask in on_gpu.values()) == int(total * 0.3)


def test_spp_draws_the_same_masks():
    """Probabilities after the same scores, and masked networks' outputs."""
    outputs = []

    def steps(net, images, labels):
        spp = SPP(net, 0.5, every=1, step=0.2, seed=3)
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        net.eval()
        for _ in range(4):
            with spp.masked():
                value = net(images)
                F.cross_entropy(value, labels).backward()
            optimizer.step()
            outputs.append(value.detach().cpu())
        spp.close()

    same(both(steps))
    half = len(outputs) // 2
    same([outputs[:half], outputs[half:]])
