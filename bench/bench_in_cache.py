"""One thread, inputs that stay in the second-level cache: what an element costs.

A call takes a list of the same tensors over again (gate_gradients as many calls), so that little of
a time is the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from bench import peers, reference
from bench.harness import Provider
from bench.ours import OURS, ours_by

#: 128 KB a tensor in float32.
SHAPE = (128, 256, 1)
REPEATS = 32
ACTIVATION = (2, 32, 28, 28)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AXES = {"rows": 0, "cols": 1, "both": (0, 1)}
#: op: its tensors, their standard deviations, what peers compute.
CASES = {
    "filter_moments": ((0.05, 0.001), peers.two),
    "second_order_moments": ((0.05, 0.001, 0.001), peers.second_order),
}
#: What a criterion that reads one moment asks for.
ONE = "ours, gw2 alone"
PROVIDERS = (*OURS, ONE, "eager", "torch.compile")
ROUNDS = 15


def _tensors(shape: tuple[int, ...], scales: tuple[float, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(shape) * scale).to(dtype) for scale in scales]


def sums(op: str, axis: str, dtype: str) -> list[Provider]:
    scales, two = CASES[op]
    tensors = _tensors(SHAPE, scales, DTYPES[dtype])
    lists = [[t] * REPEATS for t in tensors]
    expected = (
        reference.moments(*[[t] for t in tensors])
        if op == "filter_moments"
        else reference.second_order(*[[t] for t in tensors])
    )
    columns = tk.MOMENTS if op == "filter_moments" else ("joint", "q2")
    names = peers.TWO if op == "filter_moments" else columns
    axes = peers.AXES[axis]

    def check_ours(answer: Any, asked: Sequence[str] = columns) -> float:
        per_axis = answer if isinstance(answer, tuple) else (answer,)
        found = {
            f"{name}.{column}": [tables[0][:, i]]
            for name, tables in zip(axes, per_axis, strict=True)
            for i, column in enumerate(columns)
            if column in asked
        }
        return reference.check(found, expected)

    def check(layers: list[list[Tensor]]) -> float:
        return reference.check(peers.named(layers[:1], names, axes), expected)

    run = getattr(tk, op)

    def ours(backend: str | None) -> Callable[[], Any]:
        return partial(run, *lists, dim=AXES[axis], backend=backend)

    found = ours_by(ours, check_ours, torch.device("cpu"))
    if op == "filter_moments":
        one = partial(run, *lists, dim=AXES[axis], moments=("gw2",))
        found.append(Provider(ONE, one, partial(check_ours, asked=("gw2",)), "extra"))
    for label, function in (("eager", two), ("torch.compile", peers.dynamic(two))):
        layers = partial(peers.per_layer, function, axes, *lists)
        found.append(Provider(label, layers, check, "peer", label))
    return found


def gates(layout: str, dtype: str) -> list[Provider]:
    y, dy = _tensors(ACTIVATION, (1.0, 0.001), DTYPES[dtype])
    if layout == "channels_last":
        y, dy = (t.contiguous(memory_format=torch.channels_last) for t in (y, dy))
    expected = {"gates": reference.gates(y, dy, 1)}

    def check(answer: list[Tensor]) -> float:
        return reference.check({"gates": answer[0]}, expected)

    def ours(backend: str | None) -> Callable[[], list[Tensor]]:
        return lambda: [tk.gate_gradients(y, dy, backend=backend) for _ in range(REPEATS)]

    found = ours_by(ours, check, torch.device("cpu"))
    eager = peers.eager_gates if dtype == "fp32" else peers.eager_gates_float
    for label, function in (("eager", eager), ("torch.compile", peers.dynamic(eager))):
        found.append(
            Provider(
                label,
                lambda f=function: [f(y, dy, (2, 3)) for _ in range(REPEATS)],
                check,
                "peer",
                label,
            )
        )
    return found


def _elements(shape: tuple[int, ...]) -> int:
    return REPEATS * torch.Size(shape).numel()


@pytest.mark.quick(dtype=["fp32"], axis=["both"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("on", ["cpu"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("axis", list(AXES))
@pytest.mark.parametrize("op", list(CASES))
def bench_in_cache(op, axis, dtype, on, provider, measured, record, rounds, one_thread) -> None:
    case = ("in_cache", op, axis, dtype)
    results = measured.get(case, lambda: sums(op, axis, dtype), rounds(ROUNDS))
    record(case, results, provider, elements=_elements(SHAPE))


@pytest.mark.quick(dtype=["fp32"], layout=["nchw"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("on", ["cpu"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def bench_in_cache_gates(layout, dtype, on, provider, measured, record, rounds, one_thread) -> None:
    case = ("in_cache", "gate_gradients", layout, dtype)
    results = measured.get(case, lambda: gates(layout, dtype), rounds(ROUNDS))
    record(case, results, provider, elements=_elements(ACTIVATION))
