"""gate_gradients on the outputs of all layers of a network, one call a layer as hooks make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from bench import peers, reference, shapes
from bench.buffers import Buffers, buffers
from bench.harness import Provider
from bench.ours import OURS, ours_by

LAYOUTS = {
    # layout: shapes, the channels' dimension, the dimensions summed, the einsum
    "nchw": (lambda: shapes.resnet50_activations(4), 1, (2, 3), "nchw,nchw->nc"),
    "channels_last": (lambda: shapes.resnet50_activations(4), 1, (2, 3), "nchw,nchw->nc"),
    "ntc": (lambda: shapes.llama_activations(2, 256), 2, (1,), "ntc,ntc->nc"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROVIDERS = (
    *OURS,
    "eager",
    "einsum",
    "torch.compile",
    "floor: torch.dot",
    "floor: compiled dot",
    "floor: torch.sum",
)
ROUNDS = 15


@lru_cache(maxsize=1)
def activations(
    layout: str, dtype: str, quick: bool, device: torch.device
) -> tuple[Buffers, list[tuple[Tensor, Tensor]]]:
    """Outputs and their gradients, and what is expected of them per layer."""
    make, channel_dim, _, _ = LAYOUTS[layout]
    data = buffers(
        shapes.some(make(), quick),
        DTYPES[dtype],
        device,
        scales=(1.0, 0.001),
        channels_last=layout == "channels_last",
    )
    both = zip(data.first, data.second, strict=True)
    return data, [reference.gates(y, dy, channel_dim) for y, dy in both]


def providers(layout: str, dtype: str, quick: bool, device: torch.device) -> list[Provider]:
    data, expected = activations(layout, dtype, quick, device)
    _, channel_dim, dims, equation = LAYOUTS[layout]
    torch._dynamo.reset()

    def check(answer: list[Tensor]) -> float:
        each = {str(i): e for i, e in enumerate(expected)}
        return reference.check({str(i): got for i, got in enumerate(answer)}, each)

    def layers_by(gates: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [gates(y, dy) for y, dy in zip(data.first, data.second, strict=True)]

    def ours(backend: str | None) -> Callable[[], list[Tensor]]:
        return layers_by(
            lambda y, dy: tk.gate_gradients(y, dy, channel_dim=channel_dim, backend=backend)
        )

    every = ours_by(ours, check, device)
    eager = peers.eager_gates if dtype == "fp32" else peers.eager_gates_float
    compiled = peers.dynamic(eager)
    every.append(Provider("eager", layers_by(lambda y, dy: eager(y, dy, dims)), check, "peer"))
    if dtype == "fp32":  # on halves it rounds its answer to a half
        einsum = layers_by(lambda y, dy: torch.einsum(equation, y, dy))
        every.append(Provider("einsum", einsum, check, "peer"))
    warm = layers_by(lambda y, dy: compiled(y, dy, dims))
    every.append(Provider("torch.compile", warm, check, "peer"))
    for provider in every[1:]:
        provider.family = {"torch.compile": "compile"}.get(provider.label, provider.label)
    return every + data.floors()


@pytest.mark.quick(layout=["ntc"], dtype=["fp32"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def bench_gate_gradients(layout, dtype, provider, device, quick, measured, record, rounds) -> None:
    case = ("gate_gradients", layout, dtype)
    results = measured.get(case, lambda: providers(layout, dtype, quick, device), rounds(ROUNDS))
    data, _ = activations(layout, dtype, quick, device)
    record(case, results, provider, bytes_read=data.nbytes, elements=data.elements)
