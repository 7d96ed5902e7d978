"""A whole step that gives every filter Σ_k w_k² mean_n g²_{n,k}: forward, backward, scores.

On the CPU a ConvNet and ResNet-18 on 32 images of 32², with one thread and with two; on a GPU
ResNet-50 on 64 images of 224². Networks are in eval mode, where a batch's examples do not mix:
BatchNorm uses its averages, taken from that batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from bench import fisher_steps
from bench.fisher_steps import Scores, Step
from bench.harness import Provider, Result, or_reason, use_threads
from bench.models import ConvNet, resnet18, resnet50
from bench.reference import check_scores

#: how to make it, images, their side
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "convnet": (ConvNet, 32, 32),
    "resnet18": (resnet18, 32, 32),
    "resnet50": (resnet50, 64, 224),
}
ROUNDS = 9
#: What takes many times a plain step runs in the first rounds only.
SLOW_ROUNDS, SLOWEST_ROUNDS = 3, 2
#: See `reference.check_scores`; on a GPU convolutions are rounded to TF32, as is PyTorch's default.
TOLERANCE = {"cpu": 2e-2, "cuda": 1e-1}
PLAIN = "forward + backward"
OURS = "ours, in tk.scoring"
LOOP = "Torch-Pruning's loop"
CHUNK = 8
#: label -> how to set it up, and the rounds it takes part in; None: all
WAYS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Step], int | None]] = {
    PLAIN: (fisher_steps.Plain, None),
    OURS: (partial(fisher_steps.Ours, scoring=True), None),
    "ours, with weight gradients": (partial(fisher_steps.Ours, scoring=False), None),
    "unfold + matmul hooks": (fisher_steps.UnfoldHooks, None),
    "batch-1 loop": (fisher_steps.ExampleByExample, SLOW_ROUNDS),
    f"vmap(grad), {CHUNK} at a time": (
        partial(fisher_steps.Functorch, chunk=CHUNK),
        SLOW_ROUNDS,
    ),
    "vmap(grad)": (fisher_steps.Functorch, SLOW_ROUNDS),
    "Opacus": (fisher_steps.Opacus, SLOW_ROUNDS),
    "BackPACK": (fisher_steps.BackPack, SLOW_ROUNDS),
    LOOP: (fisher_steps.TorchPruning, SLOWEST_ROUNDS),
}
#: The loop would take `make gpu-check` too long.
GPU_WAYS = [label for label in WAYS if label != LOOP]
#: (network, device, threads of the CPU, way)
CASES = [
    *product(("convnet", "resnet18"), ("cpu",), (1, 2), WAYS),
    *product(("resnet50",), ("cuda",), (None,), GPU_WAYS),
]


@lru_cache(maxsize=1)
def problem(
    network: str, images: int, side: int, device: torch.device
) -> tuple[nn.Module, Tensor, Tensor, Scores]:
    """A network with its BatchNorm averages set, a batch, and its scores in float64."""
    torch.manual_seed(0)
    model = NETWORKS[network][0]().to(device)
    x = torch.randn(images, 3, side, side, device=device)
    y = torch.randint(0, 10, (images,), device=device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)
    model.eval()
    exact = fisher_steps.ExampleByExample(copy.deepcopy(model).double(), x.double(), y).run()
    return model, x, y, exact


def provider(
    label: str, model: nn.Module, x: Tensor, y: Tensor, expected: Scores, *, quick: bool = False
) -> Provider:
    """One of `WAYS`, checked against the expected scores; `quick` gives slow ones one round."""
    make, rounds = WAYS[label]
    tolerance = TOLERANCE[x.device.type]

    def build() -> Provider:
        step = make(model, x, y)
        return Provider(
            label,
            step.run,
            None if label == PLAIN else lambda scores: check_scores(scores, expected, tolerance),
            "ours" if label == OURS else "extra" if label.startswith("ours") else "peer",
            step.family,
            step.before,
            1 if quick and rounds else rounds,
        )

    ours = label.startswith("ours")
    return build() if ours or label == PLAIN else or_reason(label, build)


def relative(results: dict[str, Result], label: str) -> dict[str, float | None]:
    """Time and peak memory over the plain step's."""
    here, plain = results[label], results[PLAIN]
    if here.unavailable:
        return {}
    known = here.peak_bytes is not None and plain.peak_bytes
    return {
        "ratio_to_plain": here.median / plain.median,
        "peak_to_plain": here.peak_bytes / plain.peak_bytes if known else None,
    }


@pytest.mark.quick(network=["convnet", "resnet50"], threads=[1, None])
@pytest.mark.parametrize(("network", "on", "threads", "way"), CASES)
def bench_fisher_step(
    network, on, threads, way, device, quick, images, measured, record, rounds
) -> None:
    _, count, side = NETWORKS[network]
    count = images(count)
    where = on if threads is None else f"{threads} thread{'s' * (threads > 1)}"
    case = ("fisher_step", network, where)
    ways = WAYS if on == "cpu" else GPU_WAYS

    def providers() -> list[Provider]:
        data = problem(network, count, side, device)
        return [provider(label, *data, quick=quick) for label in ways]

    with use_threads(threads):
        results = measured.get(case, providers, rounds(ROUNDS), keep_busy=False)
    record(case, results, way, images=count, side=side, **relative(results, way))
