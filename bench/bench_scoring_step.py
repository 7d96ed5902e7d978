"""A whole scoring step of ResNet-18: forward, backward, update; with and without weight gradients.

Every step starts with no gradients in place, on a batch of 32 random images, in train mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taylor_kernels as tk
from bench.harness import Provider
from bench.models import resnet18
from bench.reference import check_scores

BATCH = 32
#: side of the images: rounds
SIDES = {32: 15, 64: 11}
#: See `reference.check_scores`.
TOLERANCE = 2e-2
PLAIN = "forward + backward"
BARE = "without weight gradients, no meter"
METERS = {
    # label: criterion, whether inside tk.scoring
    "with taylor_fo": ("taylor_fo", False),
    "with taylor_fo_bn": ("taylor_fo_bn", False),
    "with taylor_fo_gate": ("taylor_fo_gate", False),
    "scoring, taylor_fo_bn": ("taylor_fo_bn", True),
    "scoring, taylor_fo_gate": ("taylor_fo_gate", True),
}
OURS = "scoring, taylor_fo_gate"


@lru_cache(maxsize=1)
def batch(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, side, side, device=device)
    return images, torch.randint(0, 1000, (BATCH,), device=device)


def expected_scores(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """Scores in float64 by gates that are really there: criterion -> layer -> [filters]."""
    model = copy.deepcopy(model).double()
    gates: dict[str, Tensor] = {}
    with_bias: dict[str, Tensor] = {}

    def put_gate(name: str, gates: dict[str, Tensor], bias: Tensor | None) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
            gate = out.new_ones(out.shape[:2]).requires_grad_()
            gates[name] = gate
            wide = gate.view(*gate.shape, *[1] * (out.dim() - 2))
            return out * wide if bias is None else (out - bias) * wide + bias

        return hook

    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers[name] = module
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(put_gate(list(layers)[-1], gates, None))
        elif isinstance(module, nn.Linear):
            # Per example the gate is on W x, per minibatch on the whole output W x + b.
            module.register_forward_hook(put_gate(name, gates, module.bias))
            module.register_forward_hook(put_gate(name, with_bias, None))
    cross_entropy(model(x.double()), y).backward()
    return {
        "taylor_fo": {
            name: (layer.weight * layer.weight.grad).square().flatten(1).sum(1).detach()
            for name, layer in layers.items()
        },
        "taylor_fo_bn": {
            name: with_bias.get(name, gates[name]).grad.sum(0).square() for name in layers
        },
        "taylor_fo_gate": {name: gates[name].grad.square().mean(0) for name in layers},
    }


class Step:
    """One step of a model of its own, so that no provider runs into another's hooks."""

    def __init__(self, model: nn.Module, criterion: str | None, scoring: bool) -> None:
        self.model, self._scoring = model, scoring
        self.meter = tk.Importance(model, criterion) if criterion else None

    def before(self) -> None:
        self.model.zero_grad(set_to_none=True)
        if self.meter is not None:
            self.meter.reset()

    def run(self, x: Tensor, y: Tensor) -> None:
        with tk.scoring(self.model) if self._scoring else nullcontext():
            cross_entropy(self.model(x), y).backward()
            if self.meter is not None:
                self.meter.update()


def providers(side: int, device: torch.device) -> list[Provider]:
    x, y = batch(side, device)
    torch.manual_seed(0)
    original = resnet18().to(device)
    expected = expected_scores(original, x, y)

    def provider(label: str, criterion: str | None, scoring: bool) -> Provider:
        step = Step(copy.deepcopy(original), criterion, scoring)
        meter, want = step.meter, expected.get(criterion or "", {})
        return Provider(
            label,
            lambda: step.run(x, y),
            None if meter is None else lambda _: check_scores(meter.compute(), want, TOLERANCE),
            "ours" if label == OURS else "peer" if label == PLAIN else "extra",
            before=step.before,
        )

    return [
        provider(PLAIN, None, False),
        provider(BARE, None, True),
        *(provider(label, *how) for label, how in METERS.items()),
    ]


@pytest.mark.quick(side=[32])
@pytest.mark.parametrize("provider", [PLAIN, BARE, *METERS])
@pytest.mark.parametrize("side", list(SIDES))
def bench_scoring_step(side, provider, device, measured, record, rounds) -> None:
    case = ("scoring_step", "resnet18", f"{BATCH}x3x{side}x{side}")
    results = measured.get(
        case, lambda: providers(side, device), rounds(SIDES[side]), keep_busy=False
    )
    ratio = results[provider].median / results[PLAIN].median
    record(case, results, provider, ratio_to_plain=ratio, images=BATCH)
