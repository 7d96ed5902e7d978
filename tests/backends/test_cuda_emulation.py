"""filter_moments.cu and gate_gradients.cu on a CPU: see emulated.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylor_kernels.layout import activation_args
from tests.helpers import emulated
from tests.helpers.cases import (
    DTYPES,
    GateCase,
    MomentsCase,
    assert_close,
    gate_cases,
    gate_reference64,
    lay_out,
    random_bias,
    random_like_case,
    reference64,
    same_bits,
)
from tests.helpers.emulated import MOMENTS_CASES, run_moments
from tests.helpers.samples import some

GATE_CASES = [
    *(case for case in gate_cases() if 0 not in case.shape),
    GateCase("rows_in_segments", (1, 2, 141, 129), bias=True),
    GateCase("repeated_rows", (2, 300, 16), channel_dim=2, bias=True),
    GateCase("row_blocks", (2, 150, 40), channel_dim=2, bias=True),
    GateCase("heads_wide", (2, 5, 10, 40), channel_dim=2, bias=True),
    GateCase("heads_tall", (1, 200, 3, 67), channel_dim=2, bias=True),
    GateCase("features", (3, 1711), bias=True),  # blocks of a flat product, and a tail
    GateCase("features_of_few_channels", (700, 3), bias=True),  # that come round inside a vector
    GateCase("features_in_whole_vectors", (3, 1368)),
]


def gates(y: Tensor, dy: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    out = torch.full((y.size(0), y.size(dim)), float("nan"))
    emulated.run("gate_gradients", activation_args(y, dy, bias, dim % y.dim(), out))
    return out


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MOMENTS_CASES, ids=lambda case: case.name)
def test_moments(case: MomentsCase, dtype: torch.dtype) -> None:
    weight, grad = random_like_case(case, dtype)
    for rows, cols in ((True, False), (False, True), (True, True)):
        if cols and len(case.shape) == 1:
            continue
        outputs = run_moments("filter_moments", [(weight, grad)], [case.groups], rows, cols)[0]
        for dim, got in enumerate(outputs):
            if got is not None:
                assert_close(got, *reference64(weight, grad, dim, case.groups))


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATE_CASES, ids=lambda case: case.name)
def test_gates(case: GateCase, dtype: torch.dtype) -> None:
    y, dy = random_like_case(case, dtype)
    bias = random_bias(case, dtype)
    got = gates(y, dy, bias, case.channel_dim)
    assert_close(got, *gate_reference64(y, dy, bias, case.channel_dim))
    moved = (lay_out(y, "misaligned"), lay_out(dy, "misaligned"))
    if case.layout == "contiguous":
        assert same_bits(got, gates(*moved, bias, case.channel_dim))


def test_infinite_bias_reaches_its_channel_only() -> None:
    for case in GATE_CASES:
        if not case.bias:
            continue
        y, dy = random_like_case(case, torch.float32)
        bias = random_bias(case, torch.float32)
        bias[0] = float("inf")
        got = gates(y, dy, bias, case.channel_dim)
        assert not got[:, 0].isfinite().any()
        assert got[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16], 1), ids=str)
def test_bits_depend_on_the_shape_alone(dtype: torch.dtype) -> None:
    cases = [case for case in MOMENTS_CASES if 0 not in case.shape and len(case.shape) > 1]
    pairs = [random_like_case(case, dtype) for case in cases]
    groups = [case.groups for case in cases]
    others = [random_like_case(case, torch.float16) for case in cases[:5]]
    listed, listed_groups = [*others, *pairs[::-1]], [*groups[:5], *groups[::-1]]
    for axes in ((True, False), (False, True), (True, True)):
        together = run_moments("filter_moments", listed, listed_groups, *axes)[len(others) :][::-1]
        for case, pair, tables in zip(cases, pairs, together, strict=True):
            alone = run_moments("filter_moments", [pair], [case.groups], *axes)[0]
            assert all(same_bits(*both) for both in zip(alone, tables, strict=True)), case.name
            if case.layout == "contiguous":
                moved = tuple(lay_out(t, "misaligned") for t in pair)
                again = run_moments("filter_moments", [moved], [case.groups], *axes)[0]
                assert all(same_bits(*both) for both in zip(alone, again, strict=True)), case.name


def test_more_tasks_than_one_launch_holds() -> None:
    shapes = [(1 + i % 3, 1 + i % 7) for i in range(700)]
    pairs = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    found = run_moments("filter_moments", pairs, [1] * len(pairs), True, True)
    for (weight, grad), (rows, cols) in zip(pairs, found, strict=True):
        assert_close(rows, *reference64(weight, grad, 0))
        assert_close(cols, *reference64(weight, grad, 1))
