"""The CUDA and Triton kernels on a GPU: right values, and the same bits whatever is around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
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
from tests.helpers.graphs import check_replay
from tests.helpers.parameter_ops import GPU_CASES as MOMENTS_CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

GATE_CASES = [
    *gate_cases(),
    GateCase("resnet", (8, 64, 56, 56), bias=True),
    GateCase("resnet_last", (8, 256, 7, 7)),
    GateCase("channels_last", (8, 64, 56, 56), layout="channels_last", bias=True),
    GateCase("tokens", (4, 1970, 768), channel_dim=2, bias=True),
    GateCase("volume", (2, 5, 40, 33, 50)),
    GateCase("heads", (2, 300, 12, 64), channel_dim=2),
    GateCase("rows_in_segments", (1, 2, 1000, 501), bias=True),
]


def moments(
    weight: Tensor, grad: Tensor, dim: int | tuple[int, int], groups: int, backend: str
) -> tuple[Tensor, ...]:
    got = filter_moments(weight, grad, dim=dim, groups=groups, backend=backend)
    return got if isinstance(got, tuple) else (got,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MOMENTS_CASES, ids=lambda case: case.name)
def test_moments(case: MomentsCase, dtype: torch.dtype, backend: str) -> None:
    weight, grad = random_like_case(case, dtype, "cuda")
    for dim in case.dims:
        got = moments(weight, grad, dim, case.groups, backend)
        again = moments(weight, grad, dim, case.groups, backend)
        assert all(same_bits(*both) for both in zip(got, again, strict=True))
        for axis, table in zip(dim if isinstance(dim, tuple) else (dim,), got, strict=True):
            assert_close(table, *reference64(weight, grad, axis, case.groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATE_CASES, ids=lambda case: case.name)
def test_gates(case: GateCase, dtype: torch.dtype, backend: str) -> None:
    y, dy = random_like_case(case, dtype, "cuda")
    bias = random_bias(case, dtype, "cuda")
    args = {"bias": bias, "channel_dim": case.channel_dim, "backend": backend}
    got = gate_gradients(y, dy, **args)
    assert_close(got, *gate_reference64(y, dy, bias, case.channel_dim))
    assert same_bits(got, gate_gradients(y, dy, **args))


def test_bits_do_not_depend_on_the_list(backend: str) -> None:
    cases = [case for case in MOMENTS_CASES if len(case.shape) > 1]
    pairs = [random_like_case(case, DTYPES[i % 3], "cuda") for i, case in enumerate(cases)]
    weights, grads = zip(*pairs[::-1], strict=True)
    groups = [case.groups for case in cases[::-1]]
    for dim in (0, 1, (0, 1)):
        got = filter_moments(weights, grads, dim=dim, groups=groups, backend=backend)
        listed = list(zip(*got, strict=True)) if isinstance(got, tuple) else [(t,) for t in got]
        for case, pair, tables in zip(cases, pairs, listed[::-1], strict=True):
            alone = moments(*pair, dim, case.groups, backend)
            assert all(same_bits(*both) for both in zip(tables, alone, strict=True)), case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton picks another order of sums for unaligned tensors")
    for case in MOMENTS_CASES:
        if case.layout != "contiguous":
            continue
        weight, grad = random_like_case(case, dtype, "cuda")
        moved = lay_out(weight, "misaligned"), lay_out(grad, "misaligned")
        for dim in case.dims:
            here = moments(weight, grad, dim, case.groups, backend)
            there = moments(*moved, dim, case.groups, backend)
            assert all(same_bits(*both) for both in zip(here, there, strict=True)), case.name


def test_more_tensors_than_one_table_holds(backend: str) -> None:
    shapes = [(1 + i % 5, 1 + i % 7) for i in range(900)]
    weights, grads = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(2))
    rows, cols = filter_moments(weights, grads, dim=(0, 1), backend=backend)
    for weight, grad, row, col in zip(weights, grads, rows, cols, strict=True):
        assert_close(row, *reference64(weight, grad, 0))
        assert_close(col, *reference64(weight, grad, 1))


def test_nan_and_infinity_stay_in_their_filter(backend: str) -> None:
    weight, grad = torch.randn(2, 40, 30, 3, 3, device="cuda")
    weight[1, 2, 0, 0], grad[3, 0, 1, 1] = float("nan"), float("inf")
    for axis, table in enumerate(moments(weight, grad, (0, 1), 1, backend)):
        assert_close(table, *reference64(weight, grad, axis))
    y, dy = torch.randn(2, 4, 30, 20, 20, device="cuda")
    y[0, 1, 2, 2], dy[1, 2, 0, 0] = float("nan"), float("-inf")
    assert_close(gate_gradients(y, dy, backend=backend), *gate_reference64(y, dy))


def test_graph_replay_sees_new_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling memory is no part of what is captured
    shapes = [(256, 128, 3, 3), (1000, 512), (3, 500_000)]
    weights, grads = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(2))
    y, dy = torch.randn(2, 8, 600, 64, device="cuda")

    def run() -> list[Tensor]:
        rows, cols = filter_moments(weights, grads, dim=(0, 1), backend=backend)
        return [*rows, *cols, gate_gradients(y, dy, channel_dim=2, backend=backend)]

    check_replay(run, [*grads, dy])


def test_runs_on_the_current_stream(backend: str) -> None:
    weight = torch.randn(2048, 2048, device="cuda")
    grad = torch.zeros_like(weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever ran on another stream would read zeros
        grad.fill_(1)
        got = moments(weight, grad, (0, 1), 1, backend)
    stream.synchronize()
    for axis, table in enumerate(got):
        assert_close(table, *reference64(weight, torch.ones_like(weight), axis))


def test_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    weight, grad = torch.randn(2, 300, 200, 3, 3, device="cuda:1")
    for axis, table in enumerate(moments(weight, grad, (0, 1), 1, backend)):
        assert table.device == weight.device
        assert_close(table, *reference64(weight, grad, axis))


def test_more_than_2_to_31_elements(backend: str) -> None:
    rows, columns = 2**16 + 1, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    weight = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(weight)
    grad[-1, -1], grad[0, 0], grad[rows // 2, 5] = 3, 2, -1
    got_rows, got_cols = moments(weight, grad, (0, 1), 1, backend)
    assert got_rows[-1].tolist() == [3, 9, 3, columns, 9]
    assert got_rows[rows // 2].tolist() == [-1, 1, 1, columns, 1]
    assert got_cols[-1].tolist() == [3, 9, 3, rows, 9]
    assert got_cols[0].tolist() == [2, 4, 2, rows, 4]
    (alone,) = moments(weight.view(1, -1), grad.view(1, -1), 0, 1, backend)
    assert alone[0, [0, 1, 2, 4]].tolist() == [4, 14, 6, 14]
    assert abs(alone[0, 3].item() / (rows * columns) - 1) < 1e-6
    got = gate_gradients(weight.view(1, rows, columns), grad.view(1, rows, columns), channel_dim=2,
                         backend=backend)  # fmt: skip
    assert got[0, [0, 5, -1]].tolist() == [2, -1, 3]


def test_backends_agree() -> None:
    missing = [name for name in ("cuda", "triton") if not tk.available_backends()[name]]
    if missing:
        pytest.skip(f"no {missing[0]} backend here")
    for case in MOMENTS_CASES:
        weight, grad = random_like_case(case, torch.bfloat16, "cuda")
        for dim in case.dims:
            ours = moments(weight, grad, dim, case.groups, "cuda")
            theirs = moments(weight, grad, dim, case.groups, "triton")
            axes = dim if isinstance(dim, tuple) else (dim,)
            for axis, a, b in zip(axes, ours, theirs, strict=True):
                _, bound = reference64(weight, grad, axis, case.groups)
                assert_close(a, b.double(), bound)
