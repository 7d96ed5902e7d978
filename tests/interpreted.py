"""Run by test_triton_interpreter.py, with TRITON_INTERPRET=1: the Triton kernels on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch
from cases import (
    DTYPES,
    GateCase,
    MomentsCase,
    assert_close,
    filter_moments_cases,
    gate_cases,
    gate_reference64,
    random_bias,
    random_like_case,
    reference64,
)
from torch import Tensor

from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients

assert os.environ.get("TRITON_INTERPRET") == "1"

#: The interpreter is slow, so the cases take turns with the dtypes.
MOMENTS_CASES = [
    *filter_moments_cases(),
    MomentsCase("segments", (33001,)),
    MomentsCase("row_blocks", (260, 2)),
]
GATE_CASES = [
    *gate_cases(),
    GateCase("segments", (1, 1, 33001)),
    GateCase("row_blocks", (1, 300, 9), channel_dim=2, bias=True),
    GateCase("outer_rows", (2, 3, 4, 40), channel_dim=2, bias=True),
]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors start as NaN, so an output or a partial sum that nothing wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def moments(weight: Tensor, grad: Tensor, case: MomentsCase, dim: object) -> tuple[Tensor, ...]:
    got = filter_moments(weight, grad, dim=dim, groups=case.groups, backend="triton")
    return got if isinstance(got, tuple) else (got,)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("at", range(len(MOMENTS_CASES)), ids=lambda i: MOMENTS_CASES[i].name)
def test_moments(at: int) -> None:
    case = MOMENTS_CASES[at]
    weight, grad = random_like_case(case, DTYPES[at % len(DTYPES)])
    for dim in case.dims[at % 2 :]:  # (0, 1) always, else in turns
        got = moments(weight, grad, case, dim)
        for axis, table in zip(dim if isinstance(dim, tuple) else (dim,), got, strict=True):
            assert_close(table, *reference64(weight, grad, axis, case.groups))


@pytest.mark.parametrize("at", range(len(GATE_CASES)), ids=lambda i: GATE_CASES[i].name)
def test_gates(at: int) -> None:
    case = GATE_CASES[at]
    dtype = DTYPES[at % len(DTYPES)]
    y, dy = random_like_case(case, dtype)
    bias = random_bias(case, dtype)
    args = {"bias": bias, "channel_dim": case.channel_dim, "backend": "triton"}
    got = gate_gradients(y, dy, **args)
    assert_close(got, *gate_reference64(y, dy, bias, case.channel_dim))
    assert same_bits(got, gate_gradients(y, dy, **args))


def test_nan_and_infinity_stay_in_their_filter() -> None:
    weight, grad = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    weight[1, 2, 0, 0], grad[3, 0, 1, 1] = float("nan"), float("inf")
    rows, cols = filter_moments(weight, grad, dim=(0, 1), backend="triton")
    for axis, table in enumerate((rows, cols)):
        assert_close(table, *reference64(weight, grad, axis))
    y, dy = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    y[0, 1, 2, 2], dy[1, 2, 0, 0] = float("nan"), float("inf")
    assert_close(gate_gradients(y, dy, backend="triton"), *gate_reference64(y, dy))


def test_bits_do_not_depend_on_the_list() -> None:
    names = ("linear", "conv3x3_channels_last", "depthwise3x3", "grouped")
    cases = [case for case in MOMENTS_CASES if case.name in names]
    pairs = [random_like_case(case, DTYPES[i % 3]) for i, case in enumerate(cases)]
    weights, grads = zip(*pairs[::-1], strict=True)
    groups = [case.groups for case in cases[::-1]]
    for dim in (0, (0, 1)):
        got = filter_moments(weights, grads, dim=dim, groups=groups, backend="triton")
        listed = list(zip(*got, strict=True)) if isinstance(got, tuple) else [(t,) for t in got]
        for case, pair, tables in zip(cases, pairs, listed[::-1], strict=True):
            alone = moments(*pair, case, dim)
            assert all(same_bits(*both) for both in zip(tables, alone, strict=True)), case.name
