"""The diagonal of a batch by laplace-torch's backends: its own, and the drop-in classes.

    ef-resnet18, ef-vit     the empirical Fisher diagonal of 8 images of 32²
    ggn-resnet18, ggn-vit   the Gauss-Newton diagonal of 4 images, 10 classes: its own way forms
                            Jacobians of images, classes and parameters, 1.8 GB of ResNet-18's

ResNet-18 has its BatchNorm in eval mode; the ViT is that of transformers with random weights.
`backend.diag(x, y)` whole: forward and backward passes, and what is made of them. "plain" is a
training step without an update: forward and backward, gradients of all parameters. Every provider
has a model of its own. Answers are held against float64: the distance over the norm.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.harness import Provider, mib_of, or_reason
from bench.models import resnet18

pytest.importorskip("laplace", reason="laplace-torch is not installed")
from laplace import curvature as theirs

from taylor_kernels.integrations.laplace import TKEF, TKGGN

BATCH, CLASSES = {"ef": 8, "ggn": 4}, 10
PLAIN, OURS = "plain", "ours"
OWN = {
    "ef": {"CurvlinopsEF": theirs.CurvlinopsEF, "BackPackEF": theirs.BackPackEF},
    "ggn": {"CurvlinopsGGN": theirs.CurvlinopsGGN, "BackPackGGN": theirs.BackPackGGN},
}
DROP_IN = {"ef": TKEF, "ggn": TKGGN}
#: Peers take seconds, and part in fewer.
ROUNDS, PEER_ROUNDS = 5, {"ef": 2, "ggn": 1}
#: Distance from float64 over the norm, at most.
TOLERANCE = 1e-4


class ViT(nn.Module):
    """Six layers of width 192 over 8 × 8 patches of 4²: 2.7 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=32,
            patch_size=4,
            num_labels=CLASSES,
        )
        self.inner = ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


def convolutional() -> nn.Module:
    model = resnet18()
    model.classifier = nn.Linear(512, CLASSES)
    model(torch.randn(16, 3, 32, 32))  # running statistics
    return model


MODELS = {"resnet18": convolutional, "vit": ViT}


def providers(kind: str, network: str, images: int, device: torch.device) -> list[Provider]:
    torch.manual_seed(0)
    model = MODELS[network]().to(device).eval()
    x = torch.randn(images, 3, 32, 32, device=device)
    y = torch.randint(0, CLASSES, (images,), device=device)
    check = _check_against(_expected(kind, model, x, y))
    every = [_plain(copy.deepcopy(model), x, y)]
    for label, make in {**OWN[kind], OURS: DROP_IN[kind]}.items():
        every.append(
            or_reason(
                label,
                lambda label=label, make=make: _backend(label, make, model, x, y, check, kind),
            )
        )
    return every


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> Provider:
    def run() -> None:
        cross_entropy(model(x), y, reduction="sum").backward()

    before = lambda: model.zero_grad(set_to_none=True)  # noqa: E731
    return Provider(PLAIN, run, role="extra", family="plain", before=before)


def _backend(
    label: str,
    make: Callable[..., Any],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    check: Callable[[Any], float],
    kind: str,
) -> Provider:
    own = copy.deepcopy(model)
    if label.startswith("BackPack"):
        from backpack import extend

        own = extend(own, use_converter=True)  # a network that is no Sequential
    own.output_size = CLASSES  # as fit() says
    backend = make(own, "classification")

    def run() -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return backend.diag(x, y, N=len(x))

    def before() -> None:
        own.zero_grad(set_to_none=True)
        for parameter in own.parameters():
            for name in ("sum_grad_squared", "diag_ggn_exact"):
                parameter.__dict__.pop(name, None)

    role = "ours" if label == OURS else "peer"
    rounds = None if label == OURS else PEER_ROUNDS[kind]
    return Provider(label, run, check, role, "laplace-torch", before=before, rounds=rounds)


def _expected(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """In float64, by one backward pass for each example, and for each class of it."""
    wide = copy.deepcopy(model).double()
    parameters, total = [*wide.parameters()], torch.zeros(())
    for image, label in zip(x.double().split(1), y.split(1), strict=True):
        z = wide(image)
        p = z.detach().softmax(1)[0]
        if kind == "ef":
            vectors = [p - nn.functional.one_hot(label[0], CLASSES)]
        else:
            values, directions = torch.linalg.eigh(p.diag() - p[:, None] * p)
            vectors = (directions * values.clamp(min=0).sqrt()).unbind(1)
        for vector in vectors:
            found = torch.autograd.grad(z, parameters, vector[None], retain_graph=True)
            total = total + torch.cat([g.flatten() for g in found]).square().cpu()
    return total


def _check_against(want: Tensor) -> Callable[[Any], float]:
    def check(found: tuple[Tensor, Tensor]) -> float:
        distance = float((found[1].double().cpu() - want).norm() / want.norm())
        assert distance <= TOLERANCE, f"off by {distance:.1e} of the norm"
        return distance

    return check


CASES = [
    (kind, network, label)
    for kind in OWN
    for network in MODELS
    for label in (PLAIN, *OWN[kind], OURS)
]


@pytest.mark.quick(kind=["ef"], network=["vit"])
@pytest.mark.parametrize(("kind", "network", "provider"), CASES)
def bench_laplace(kind, network, provider, device, images, measured, record, rounds) -> None:
    case = ("laplace", f"{kind}-{network}")
    results = measured.get(
        case, lambda: providers(kind, network, images(BATCH[kind]), device), rounds(ROUNDS)
    )
    record(case, results, provider, parameters_mib=mib_of(MODELS[network]()))
