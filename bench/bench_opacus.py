"""Norms of per-example gradients: of single layers, and in a step of Opacus's ghost clipping.

    layers     weight gradients' norms from x and dy: ours by default, by its kernels alone, and by
               Gram matrices alone; Opacus's gradients of examples; torch.func's vmap(grad)
    step       ResNet-18 with GroupNorm, 16 images of 64²: a plain step (forward and backward), and
               Opacus's fast gradient clipping (both backward passes) with its norms and with ours

Norms are held against float64, example by example, before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

import taylor_kernels as tk
from bench.harness import Provider
from bench.models import resnet18
from taylor_kernels.backends import gram

opacus = pytest.importorskip("opacus", reason="opacus is not installed")
from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.grad_sample.conv import compute_conv_grad_sample  # noqa: E402
from opacus.grad_sample.linear import compute_linear_grad_sample  # noqa: E402
from opacus.optimizers import DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import (  # noqa: E402
    DPLossFastGradientClipping,
)
from opacus.validators import ModuleValidator  # noqa: E402

from taylor_kernels.integrations.opacus import register_norm_samplers  # noqa: E402

OURS, KERNELS, GRAM = "ours", "ours, kernels", "ours, Gram"
OPACUS, VMAP, PLAIN = "Opacus", "vmap(grad)", "plain step"
#: Relative error of a squared norm.
TOLERANCE = 1e-3
BATCH = 16


class Layer(NamedTuple):
    """A layer and the shape of an example."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


LAYERS = {
    "64 3x3 32²": Layer(lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32)),
    "128 3x3 16²": Layer(lambda: nn.Conv2d(128, 128, 3, padding=1), (128, 16, 16)),
    "256 3x3 14²": Layer(lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 14, 14)),
    "512 3x3 7²": Layer(lambda: nn.Conv2d(512, 512, 3, padding=1), (512, 7, 7)),
    "256 3x3 /2 14²": Layer(lambda: nn.Conv2d(256, 512, 3, 2, padding=1), (256, 14, 14)),
    "768 tokens 197": Layer(lambda: nn.Linear(768, 768), (197, 768)),
}


def _within(expected: Tensor) -> Callable[[Tensor], float]:
    def check(found: Tensor) -> float:
        error = float(((found.double().cpu() - expected) / expected).abs().max())
        assert error <= TOLERANCE, f"off by {error:.1e}"
        return error

    return check


def layers(name: str, device: torch.device) -> list[Provider]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name].make().to(device), LAYERS[name].shape
    x = torch.randn(BATCH, *shape, device=device)
    dy = torch.randn_like(layer(x))
    weight = layer.weight.detach()

    def loss(weight: Tensor, one: Tensor, along: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": layer.bias.detach()}
        return (torch.func.functional_call(layer, parameters, (one[None],))[0] * along).sum()

    wide = weight.double()
    layer.double()
    expected = torch.stack(
        [
            grad(loss)(wide, a.double(), b.double()).square().sum()
            for a, b in zip(x, dy, strict=True)
        ]
    )
    layer.float()

    def ours(backend: str | None = None) -> Tensor:
        if isinstance(layer, nn.Linear):
            return tk.linear_example_norms(x, dy, backend=backend)
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return tk.conv2d_example_norms(x, weight.shape, dy, *geometry, backend=backend)

    def by_gram() -> Tensor:
        with patch.object(gram, "is_shorter", lambda *_: True):
            return ours()

    def of_opacus() -> Tensor:
        linear = isinstance(layer, nn.Linear)
        sample = compute_linear_grad_sample if linear else compute_conv_grad_sample
        return sample(layer, [x], dy)[layer.weight].flatten(1).square().sum(1)

    def by_vmap() -> Tensor:
        return vmap(grad(loss), (None, 0, 0))(weight, x, dy).flatten(1).square().sum(1)

    check = _within(expected.cpu())
    named = "cuda" if device.type == "cuda" else "cpu"
    return [
        Provider(OURS, ours, check, "ours"),
        Provider(KERNELS, lambda: ours(named), check, "extra"),
        Provider(GRAM, by_gram, check, "extra"),
        Provider(OPACUS, of_opacus, check, family="opacus"),
        Provider(VMAP, by_vmap, check, family="torch.func"),
    ]


def step(device: torch.device) -> list[Provider]:
    torch.manual_seed(0)
    original = ModuleValidator.fix(resnet18()).to(device)
    for module in original.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # Opacus's hooks hand views on
    x = torch.randn(BATCH, 3, 64, 64, device=device)
    y = torch.randint(0, 1000, (BATCH,), device=device)
    wide = copy.deepcopy(original).double()
    squares = []
    for one, label in zip(x.double().split(1), y.split(1), strict=True):
        wide.zero_grad()
        cross_entropy(wide(one), label).backward()
        squares.append(sum(float(p.grad.square().sum()) for p in wide.parameters()))
    check = _within(torch.tensor(squares, dtype=torch.float64))
    del wide

    plain = copy.deepcopy(original)

    def run_plain() -> None:
        cross_entropy(plain(x), y).backward()

    every = [Provider(PLAIN, run_plain, None, "floor", before=plain.zero_grad)]
    for label in (OPACUS, OURS):
        model = GradSampleModuleFastGradientClipping(copy.deepcopy(original))
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(model.parameters(), 0.1), noise_multiplier=0.0, max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )  # fmt: skip
        criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

        def run(model: nn.Module = model, criterion: Callable = criterion) -> Tensor:
            criterion(model(x), y).backward()
            return model.per_sample_gradient_norms.square()

        def run_ours(run: Callable[[], Tensor] = run) -> Tensor:
            with register_norm_samplers():
                return run()

        def before(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model.zero_grad()

        role = "ours" if label == OURS else "peer"
        run_it = run_ours if label == OURS else run
        every.append(Provider(label, run_it, check, role, "opacus", before=before))
    return every


@pytest.mark.quick(layer=["512 3x3 7²", "768 tokens 197"])
@pytest.mark.parametrize("provider", [OURS, KERNELS, GRAM, OPACUS, VMAP])
@pytest.mark.parametrize("layer", list(LAYERS))
def bench_layers(layer, provider, device, measured, record, rounds) -> None:
    case = ("opacus", "layer", layer)
    results = measured.get(case, lambda: layers(layer, device), rounds(5))
    record(case, results, provider)


@pytest.mark.parametrize("provider", [PLAIN, OPACUS, OURS])
def bench_step(provider, device, measured, record, rounds) -> None:
    case = ("opacus", "step")
    results = measured.get(case, lambda: step(device), rounds(3))
    record(case, results, provider)
