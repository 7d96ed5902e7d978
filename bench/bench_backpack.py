"""BackPACK's SumGradSquared and BatchL2Grad: its own, and the drop-in classes.

A whole step, forward and backward, of 32 images of 32²: a ConvNet, and ResNet-18 with BatchNorm in
eval mode through BackPACK's converter. Every provider has a model of its own. Fields of all
parameters are held against float64: the distance over the norm.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.harness import Provider, mib_of
from bench.models import ConvNet, resnet18

pytest.importorskip("backpack", reason="BackPACK is not installed")
from backpack import backpack, extend, extensions

from taylor_kernels.integrations import backpack as door

BATCH = 32
THEIRS, OURS = "BackPACK", "ours"
FIELDS = {"sum_grad_squared": "SumGradSquared", "batch_l2": "BatchL2Grad"}
#: BackPACK takes seconds, and part in fewer.
ROUNDS, PEER_ROUNDS = 5, 2
#: Distance from float64 over the norm, at most.
TOLERANCE = 1e-4


def residual() -> nn.Module:
    model = resnet18()
    model.classifier = nn.Linear(512, 10)
    model(torch.randn(BATCH, 3, 32, 32))  # running statistics
    return model


MODELS = {"convnet": ConvNet, "resnet18": residual}


def providers(field: str, network: str, images: int, device: torch.device) -> list[Provider]:
    torch.manual_seed(0)
    model = MODELS[network]().to(device).eval()
    x = torch.randn(images, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (images,), device=device)
    check = _check_against(_expected(field, model, x, y))
    return [
        _provider(label, source, field, model, x, y, check)
        for label, source in ((THEIRS, extensions), (OURS, door))
    ]


def _provider(
    label: str,
    source: Any,
    field: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    check: Callable[[Any], float],
) -> Provider:
    own = extend(copy.deepcopy(model), use_converter=not isinstance(model, nn.Sequential))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    names = [name for name, _ in own.named_parameters()]

    def run() -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with backpack(getattr(source, FIELDS[field])()):
                loss(own(x), y).backward()
        return {name: getattr(own.get_parameter(name), field) for name in names}

    def before() -> None:
        own.zero_grad(set_to_none=True)
        for parameter in own.parameters():
            parameter.__dict__.pop(field, None)

    role = "ours" if label == OURS else "peer"
    rounds = None if label == OURS else PEER_ROUNDS
    return Provider(label, run, check, role, "backpack", before=before, rounds=rounds)


def _expected(field: str, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """In float64, by one backward pass for each example."""
    wide = copy.deepcopy(model).double()
    parameters = dict(wide.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for image, label in zip(x.double().split(1), y.split(1), strict=True):
        loss = nn.functional.cross_entropy(wide(image), label)
        for name, gradient in zip(
            parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True
        ):
            squares = gradient.square().cpu()
            if field == "batch_l2":
                found[name].append(squares.sum())
            else:
                found[name] = [sum(found[name], squares)]
    if field == "batch_l2":
        return {name: torch.stack(values) for name, values in found.items()}
    return {name: value for name, (value,) in found.items()}


def _check_against(want: dict[str, Tensor]) -> Callable[[Any], float]:
    def check(found: dict[str, Tensor]) -> float:
        assert found.keys() == want.keys()
        distance = _norm([found[n].double().cpu() - want[n] for n in want]) / _norm(want.values())
        assert distance <= TOLERANCE, f"off by {distance:.1e} of the norm"
        return distance

    return check


def _norm(tensors: Any) -> float:
    parts: Sequence[Tensor] = [tensor.norm() for tensor in tensors]
    return float(torch.stack(parts).norm())


@pytest.mark.quick(network=["convnet"])
@pytest.mark.parametrize("provider", [THEIRS, OURS])
@pytest.mark.parametrize("network", list(MODELS))
@pytest.mark.parametrize("field", list(FIELDS))
def bench_backpack(field, network, provider, device, images, measured, record, rounds) -> None:
    case = ("backpack", f"{field}-{network}")
    results = measured.get(
        case, lambda: providers(field, network, images(BATCH), device), rounds(ROUNDS)
    )
    record(case, results, provider, parameters_mib=mib_of(MODELS[network]()))
