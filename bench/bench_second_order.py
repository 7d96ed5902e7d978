"""second_order_moments, hutchinson_moments and rademacher_like on all weights of ResNet-50.

The first reads w, g and Hv, the second w and Hz: it draws its probe z again, which peers read from
memory. Memory is shared as in bench_filter_moments.py. The floor of rademacher_like writes zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from bench import peers, reference, shapes
from bench.buffers import Buffers, buffers
from bench.harness import Provider
from bench.ours import OURS, ours_by

NETWORKS = {
    "resnet50-fp32": (shapes.resnet50_weights, torch.float32),
    "resnet50-bf16": (shapes.resnet50_weights, torch.bfloat16),
}
ROUNDS = 15
SEED = 1
#: Of w, g and Hv, or of w and Hz.
SCALES = {"second_order_moments": (0.05, 0.001, 0.001), "hutchinson_moments": (0.05, 0.001)}
PROVIDERS = (
    *OURS,
    "eager",
    "torch.compile",
    "torch.compile, one graph",
    "floor: torch.dot",
    "floor: compiled dot",
    "floor: torch.sum",
)
PROBE_PROVIDERS = (*OURS, "randint", "bernoulli_", "floor: zero_")


@lru_cache(maxsize=1)
def inputs(
    op: str, network: str, quick: bool, device: torch.device
) -> tuple[Buffers, reference.Expected]:
    make, dtype = NETWORKS[network]
    data = buffers(shapes.some(make(), quick), dtype, device, scales=SCALES[op])
    if op == "second_order_moments":
        return data, reference.second_order(*data.lists)
    return data, reference.hutchinson(*data.lists, probes(data))


def probes(data: Buffers) -> list[Tensor]:
    return tk.rademacher_like(data.first, seed=SEED)


def providers(
    op: str, network: str, axis: str, quick: bool, device: torch.device
) -> list[Provider]:
    data, expected = inputs(op, network, quick, device)
    axes = peers.AXES[axis]
    torch._dynamo.reset()
    if op == "second_order_moments":
        function, names, lists = peers.second_order, ("joint", "q2"), data.lists
        run: Callable[..., Any] = partial(tk.second_order_moments, *data.lists)
    else:
        function, names, lists = peers.hutchinson, ("curvature",), [*data.lists, probes(data)]
        run = partial(tk.hutchinson_moments, *data.lists, seed=SEED)

    def check_ours(answer: list[Tensor] | tuple[list[Tensor], list[Tensor]]) -> float:
        per_axis = answer if isinstance(answer, tuple) else (answer,)
        found = {
            f"{name}.{column}": [t.reshape(len(t), -1)[:, i] for t in tables]
            for name, tables in zip(axes, per_axis, strict=True)
            for i, column in enumerate(names)
        }
        return reference.check(found, expected)

    def check(layers: list[list[Tensor]]) -> float:
        return reference.check(peers.named(layers, names, axes), expected)

    dim = {"rows": 0, "cols": 1, "both": (0, 1)}[axis]
    every = ours_by(lambda backend: partial(run, dim=dim, backend=backend), check_ours, device)
    in_3d = [peers.as_3d(tensors) for tensors in lists]
    layers = partial(peers.per_layer, function, axes, *in_3d)
    every.append(Provider("eager", layers, check, "peer", "eager"))
    compiled = partial(peers.per_layer, peers.dynamic(function), axes, *in_3d)
    every.append(Provider("torch.compile", compiled, check, "peer", "compile"))
    if axis != "cols" and device.type == "cpu":
        graph = peers.static(lambda *tensors: peers.per_layer(function, axes, *tensors))
        whole = partial(graph, *in_3d)
        every.append(Provider("torch.compile, one graph", whole, check, "peer", "compile-static"))
    return every + data.floors()


def probe_providers(network: str, quick: bool, device: torch.device) -> list[Provider]:
    make, dtype = NETWORKS[network]
    weights = buffers(shapes.some(make(), quick), dtype, device, scales=(1.0,)).first
    elements = sum(w.numel() for w in weights)

    def check(signs: list[Tensor]) -> float:
        """The distance of the signs' sum from its mean, 0, in standard deviations."""
        assert all((z.abs() == 1).all() for z in signs)
        off = abs(sum(float(z.sum(dtype=torch.float64)) for z in signs)) / elements**0.5
        assert off < 6, f"{off:.1f} standard deviations"
        return off

    def randint() -> list[Tensor]:
        return [torch.randint_like(w, 2).mul_(2).sub_(1) for w in weights]

    def bernoulli() -> list[Tensor]:
        return [torch.empty_like(w).bernoulli_().mul_(2).sub_(1) for w in weights]

    every = ours_by(
        lambda backend: partial(tk.rademacher_like, weights, seed=SEED, backend=backend),
        check,
        device,
    )
    return [
        *every,
        Provider("randint", randint, check, "peer", "eager"),
        Provider("bernoulli_", bernoulli, check, "peer", "eager"),
        Provider("floor: zero_", lambda: [torch.zeros_like(w) for w in weights], None, "floor"),
    ]


@pytest.mark.quick(network=["resnet50-fp32"], axis=["both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("axis", ["rows", "cols", "both"])
@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("op", list(SCALES))
def bench_second_order(
    op, network, axis, provider, device, quick, measured, record, rounds
) -> None:
    case = (op, network, axis)
    results = measured.get(case, lambda: providers(*case, quick, device), rounds(ROUNDS))
    data, _ = inputs(op, network, quick, device)
    record(case, results, provider, bytes_read=data.nbytes, elements=data.elements)


@pytest.mark.quick(network=["resnet50-fp32"])
@pytest.mark.parametrize("provider", PROBE_PROVIDERS)
@pytest.mark.parametrize("network", list(NETWORKS))
def bench_second_order_probes(network, provider, device, quick, measured, record, rounds) -> None:
    case = ("rademacher_like", network)
    results = measured.get(case, lambda: probe_providers(network, quick, device), rounds(ROUNDS))
    elements = shapes.elements(shapes.some(NETWORKS[network][0](), quick))
    nbytes = elements * NETWORKS[network][1].itemsize
    record(case, results, provider, bytes_read=nbytes, elements=elements)
