"""One thread, inputs that stay in the second-level cache: what an element costs.

A call takes a list of the same tensors over again (gate_gradients as many calls), so that little of
a time is the call. A compiled function is called for each tensor, which takes longer than the sums
of one. So it runs in two ways: on the same tensors, and compiled for tensors of four times the
size, a quarter as many.
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
#: How many times as large the tensors of `LARGER` are.
TIMES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AXES = {"rows": 0, "cols": 1, "both": (0, 1)}
#: op: its tensors, their standard deviations, what peers compute.
CASES = {
    "filter_moments": ((0.05, 0.001), peers.two),
    "second_order_moments": ((0.05, 0.001, 0.001), peers.second_order),
}
#: What a criterion that reads one moment asks for.
ONE = "ours, gw2 alone"
LARGER = "torch.compile, larger tensors"
PROVIDERS = (*OURS, ONE, "eager", "torch.compile", LARGER)
ROUNDS = 15


def _tensors(shape: tuple[int, ...], scales: tuple[float, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(shape) * scale).to(dtype) for scale in scales]


def sums(op: str, axis: str, dtype: str) -> list[Provider]:
    scales, two = CASES[op]
    tensors = _tensors(SHAPE, scales, DTYPES[dtype])
    lists = [[t] * REPEATS for t in tensors]
    truth = reference.moments if op == "filter_moments" else reference.second_order
    expected = truth(*[[t] for t in tensors])
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

    def check(layers: list[list[Tensor]], of: reference.Expected = expected) -> float:
        return reference.check(peers.named(layers[:1], names, axes), of)

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
    larger = _tensors((TIMES * SHAPE[0], *SHAPE[1:]), scales, DTYPES[dtype])
    few = [[t] * (REPEATS // TIMES) for t in larger]
    layers = partial(peers.per_layer, peers.static(two), axes, *few)
    check_larger = partial(check, of=truth(*[[t] for t in larger]))
    found.append(Provider(LARGER, layers, check_larger, "peer", "torch.compile"))
    return found


def gates(layout: str, dtype: str) -> list[Provider]:
    y, dy = _activations(ACTIVATION, layout, dtype)
    eager = peers.eager_gates if dtype == "fp32" else peers.eager_gates_float

    def calls(function: Callable[[], Tensor], count: int) -> Callable[[], list[Tensor]]:
        return lambda: [function() for _ in range(count)]

    def check(answer: list[Tensor], y: Tensor = y, dy: Tensor = dy) -> float:
        return reference.check({"gates": answer[0]}, {"gates": reference.gates(y, dy, 1)})

    def ours(backend: str | None) -> Callable[[], list[Tensor]]:
        return calls(partial(tk.gate_gradients, y, dy, backend=backend), REPEATS)

    found = ours_by(ours, check, torch.device("cpu"))
    for label, function in (("eager", eager), ("torch.compile", peers.dynamic(eager))):
        run = calls(partial(function, y, dy, (2, 3)), REPEATS)
        found.append(Provider(label, run, check, "peer", label))
    larger = _activations((TIMES * ACTIVATION[0], *ACTIVATION[1:]), layout, dtype)
    run = calls(partial(peers.static(eager), *larger, (2, 3)), REPEATS // TIMES)
    check_larger = partial(check, y=larger[0], dy=larger[1])
    found.append(Provider(LARGER, run, check_larger, "peer", "torch.compile"))
    return found


def _activations(shape: tuple[int, ...], layout: str, dtype: str) -> list[Tensor]:
    tensors = _tensors(shape, (1.0, 0.001), DTYPES[dtype])
    if layout == "channels_last":
        return [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    return tensors


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
