"""filter_moments on all weights of a network: rows, columns, and both from one read.

Peers compute (Σgw)² and Σ(gw)², ours all five moments, as does one torch.compile, for fairness.
Every provider reads the same memory: weights are consecutive views of one flat buffer, gradients
of another, and the floors read those two buffers as they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from bench import peers, reference, shapes
from bench.buffers import Buffers, buffers
from bench.harness import Provider
from bench.models import resnet50
from bench.ours import OURS, ours_by

NETWORKS = {
    "resnet50-fp32": (shapes.resnet50_weights, torch.float32, 25),
    "llama-fp32": (shapes.llama_weights, torch.float32, 5),
    "llama-bf16": (shapes.llama_weights, torch.bfloat16, 5),
}
PROVIDERS = (
    *OURS,
    "eager",
    "torch._foreach",
    "torch.compile",
    "torch.compile, one graph",
    "torch.compile, all five moments",
    "Torch-Pruning sweep",
    "Torch-Pruning's rule on ours",
    "floor: torch.dot",
    "floor: compiled dot",
    "floor: torch.sum",
)


@lru_cache(maxsize=1)
def lists(network: str, quick: bool, device: torch.device) -> tuple[Buffers, reference.Expected]:
    """Weights and gradients of a trained network's magnitudes, and their moments in float64."""
    make, dtype, _ = NETWORKS[network]
    data = buffers(shapes.some(make(), quick), dtype, device, scales=(0.05, 0.001))
    return data, reference.moments(data.first, data.second)


def providers(network: str, axis: str, quick: bool, device: torch.device) -> list[Provider]:
    data, expected = lists(network, quick, device)
    axes = peers.AXES[axis]
    w3, g3 = peers.as_3d(data.first), peers.as_3d(data.second)
    torch._dynamo.reset()
    every = _ours(data, expected, axis, device)

    def add(
        label: str, run: Callable[[], list[list[Tensor]]], names: tuple[str, ...], family: str
    ) -> None:
        def check(layers: list[list[Tensor]]) -> float:
            return reference.check(peers.named(layers, names, axes), expected)

        role = "extra" if names == peers.FIVE else "peer"
        every.append(Provider(label, run, check, role, family))

    def layers_by(function: Callable[..., list[Tensor]]) -> Callable[[], list[list[Tensor]]]:
        return lambda: peers.per_layer(function, axes, w3, g3)

    add("eager", layers_by(peers.two), peers.TWO, "eager")
    if data.first[0].dtype == torch.float32:
        foreach = lambda: peers.foreach_two(w3, g3, axes)  # noqa: E731
        add("torch._foreach", foreach, peers.TWO, "foreach")
    add("torch.compile", layers_by(peers.dynamic(peers.two)), peers.TWO, "compile")
    if axis != "cols":
        five = layers_by(peers.dynamic(peers.five))
        add("torch.compile, all five moments", five, peers.FIVE, "compile")
    if network.startswith("resnet50") and axis != "cols" and device.type == "cpu":
        graph = peers.static(lambda w, g: peers.per_layer(peers.two, axes, w, g))
        add("torch.compile, one graph", lambda: graph(w3, g3), peers.TWO, "compile-static")
    if network == "resnet50-fp32" and axis == "both":
        every += _torch_pruning(device)
    return every + data.floors()


def _ours(
    data: Buffers, expected: reference.Expected, axis: str, device: torch.device
) -> list[Provider]:
    dim = {"rows": 0, "cols": 1, "both": (0, 1)}[axis]

    def check(answer: list[Tensor] | tuple[list[Tensor], list[Tensor]]) -> float:
        tables = answer if isinstance(answer, tuple) else (answer,)
        return reference.check(
            {
                f"{name}.{moment}": [t[:, i] for t in table]
                for name, table in zip(peers.AXES[axis], tables, strict=True)
                for i, moment in enumerate(tk.MOMENTS)
            },
            expected,
        )

    def run(backend: str | None) -> Callable[[], object]:
        return lambda: tk.filter_moments(data.first, data.second, dim=dim, backend=backend)

    return ours_by(run, check, device)


def _torch_pruning(device: torch.device) -> list[Provider]:
    """Torch-Pruning's sweep, and the same scores from one call of ours: a peer of its own task."""
    if find_spec("torch_pruning") is None:
        return []
    torch.manual_seed(0)
    model = resnet50().to(device)
    sweep = peers.TorchPruning(model, torch.randn(1, 3, 64, 64, device=device))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 0.001
    weights = [w.detach() for w in sweep.weights]
    grads = [w.grad for w in sweep.weights]
    expected = sweep.expected(reference.moments(weights, grads))

    def check(scores: list[Tensor]) -> float:
        return reference.check(sweep.answer(scores), expected)

    def on_ours() -> list[Tensor]:
        tables = tk.filter_moments(weights, grads, dim=(0, 1))
        return sweep.by_rule(tuple([t[:, 2] for t in table] for table in tables))

    return [
        Provider("Torch-Pruning sweep", sweep.run, check, "peer", "torch-pruning"),
        Provider("Torch-Pruning's rule on ours", on_ours, check, "extra"),
    ]


@pytest.mark.quick(network=["resnet50-fp32"], axis=["both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("axis", ["rows", "cols", "both"])
@pytest.mark.parametrize("network", list(NETWORKS))
def bench_filter_moments(network, axis, provider, device, quick, measured, record, rounds) -> None:
    case = ("filter_moments", network, axis)
    results = measured.get(
        case, lambda: providers(network, axis, quick, device), rounds(NETWORKS[network][2])
    )
    data, _ = lists(network, quick, device)
    record(case, results, provider, bytes_read=data.nbytes, elements=data.elements)
