"""filter_moments.cu and gate_gradients.cu on a CPU: see emulated.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import emulated
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
    lay_out,
    random_bias,
    random_like_case,
    reference64,
    same_bits,
)
from emulated import CODES, poisoned
from torch import Tensor

from taylor_kernels.layout import ParameterItem, activation_args, parameter_item

#: Shapes that cross a limit of csrc/plan.h: segments of rows, blocks of rows, tiles of positions.
MOMENTS_CASES = [
    *filter_moments_cases(),
    MomentsCase("segments", (2, 20011)),
    MomentsCase("segment_ends_a_vector", (1, 8192 * 2)),
    MomentsCase("row_blocks", (131, 136)),
    MomentsCase("row_blocks_and_tiles", (70, 30, 3, 3)),
    MomentsCase("few_rows_wide", (3, 150, 3, 3)),
    MomentsCase("ten_rows_wide", (10, 700)),
    MomentsCase("channels_last_blocks", (30, 40, 3, 3), layout="channels_last"),
    MomentsCase("long_runs", (5, 3, 8, 8)),
    MomentsCase("long_runs_tiles", (70, 3, 16, 16)),
    MomentsCase("many_rows_one_column", (9000, 1)),
    MomentsCase("tall", (700, 5)),
]
GATE_CASES = [
    *gate_cases(),
    GateCase("rows_in_segments", (1, 2, 141, 129), bias=True),
    GateCase("repeated_rows", (2, 300, 16), channel_dim=2, bias=True),
    GateCase("row_blocks", (2, 150, 40), channel_dim=2, bias=True),
    GateCase("heads_wide", (2, 5, 10, 40), channel_dim=2, bias=True),
    GateCase("heads_tall", (1, 200, 3, 67), channel_dim=2, bias=True),
]


class Item(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("kernel", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("row_out", ctypes.c_void_p),
        ("col_out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("stream", ctypes.c_uint32),
    ]


class Args(ctypes.Structure):
    _fields_ = [
        ("y", ctypes.c_void_p),
        ("dy", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("outer", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated.kernels()


def moments(
    kernels: ctypes.CDLL, pairs: Sequence[tuple[Tensor, Tensor, int]], rows: bool, cols: bool
) -> list[tuple[Tensor | None, Tensor | None]]:
    outputs, items = [], []
    for weight, grad, groups in pairs:
        columns = groups * (weight.size(1) if weight.dim() > 1 else 1)
        row_out = torch.full((weight.size(0), 5), float("nan")) if rows else None
        col_out = torch.full((columns, 5), float("nan")) if cols else None
        outputs.append((row_out, col_out))
        items.append(parameter_item(weight, grad, None, groups, row_out, col_out))
    table = (Item * len(items))(*(_packed(item) for item in items))
    count = ctypes.c_int64(len(items))
    _workspace, pointer = poisoned(kernels.moments_workspace(table, count))
    kernels.moments(table, count, pointer)
    return outputs


def _packed(item: ParameterItem) -> Item:
    pointers = [0 if t is None else t.data_ptr() for t in (item.row_out, item.col_out)]
    sizes = (item.rows, item.channels, item.kernel, item.groups)
    return Item(
        item.weight.data_ptr(),
        item.grad.data_ptr(),
        0,
        *sizes,
        *pointers,
        CODES[item.weight.dtype],
        item.channels_last,
        item.stream,
    )


def gates(kernels: ctypes.CDLL, y: Tensor, dy: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    out = torch.full((y.size(0), y.size(dim)), float("nan"))
    args = activation_args(y, dy, bias, dim % y.dim(), out)
    pointers = [
        0 if t is None else t.data_ptr()
        for t in (args.output, args.grad_output, args.bias, args.out)
    ]
    sizes = (args.batch, args.outer, args.channels, args.inner)
    packed = Args(*pointers, *sizes, CODES[args.output.dtype])
    _workspace, pointer = poisoned(kernels.gates_workspace(ctypes.byref(packed)))
    kernels.gates(ctypes.byref(packed), pointer)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MOMENTS_CASES, ids=lambda case: case.name)
def test_moments(kernels: ctypes.CDLL, case: MomentsCase, dtype: torch.dtype) -> None:
    if 0 in case.shape:
        pytest.skip("the op answers for empty tensors itself")
    weight, grad = random_like_case(case, dtype)
    for rows, cols in ((True, False), (False, True), (True, True)):
        if cols and len(case.shape) == 1:
            continue
        outputs = moments(kernels, [(weight, grad, case.groups)], rows, cols)[0]
        for dim, got in enumerate(outputs):
            if got is not None:
                assert_close(got, *reference64(weight, grad, dim, case.groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATE_CASES, ids=lambda case: case.name)
def test_gates(kernels: ctypes.CDLL, case: GateCase, dtype: torch.dtype) -> None:
    if 0 in case.shape:
        pytest.skip("the op answers for empty tensors itself")
    y, dy = random_like_case(case, dtype)
    bias = random_bias(case, dtype)
    got = gates(kernels, y, dy, bias, case.channel_dim)
    assert_close(got, *gate_reference64(y, dy, bias, case.channel_dim))
    moved = (lay_out(y, "misaligned"), lay_out(dy, "misaligned"))
    if case.layout == "contiguous":
        assert same_bits(got, gates(kernels, *moved, bias, case.channel_dim))


def test_infinite_bias_reaches_its_channel_only(kernels: ctypes.CDLL) -> None:
    for case in GATE_CASES:
        if 0 in case.shape or not case.bias:
            continue
        y, dy = random_like_case(case, torch.float32)
        bias = random_bias(case, torch.float32)
        bias[0] = float("inf")
        got = gates(kernels, y, dy, bias, case.channel_dim)
        assert not got[:, 0].isfinite().any()
        assert got[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_shape_alone(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    cases = [case for case in MOMENTS_CASES if 0 not in case.shape and len(case.shape) > 1]
    pairs = [(*random_like_case(case, dtype), case.groups) for case in cases]
    others = [(*random_like_case(case, torch.float16), case.groups) for case in cases[:5]]
    for rows, cols in ((True, False), (False, True), (True, True)):
        one_by_one = [moments(kernels, [pair], rows, cols)[0] for pair in pairs]
        together = moments(kernels, [*others, *pairs[::-1]], rows, cols)[len(others) :][::-1]
        for case, alone, listed in zip(cases, one_by_one, together, strict=True):
            assert all(same_bits(*both) for both in zip(alone, listed, strict=True)), case.name
        for case, alone, (weight, grad, groups) in zip(cases, one_by_one, pairs, strict=True):
            if case.layout == "contiguous":
                moved = (lay_out(weight, "misaligned"), lay_out(grad, "misaligned"), groups)
                again = moments(kernels, [moved], rows, cols)[0]
                assert all(same_bits(*both) for both in zip(alone, again, strict=True)), case.name


def test_more_tasks_than_one_launch_holds(kernels: ctypes.CDLL) -> None:
    shapes = [(1 + i % 3, 1 + i % 7) for i in range(700)]
    pairs = [(torch.randn(shape), torch.randn(shape), 1) for shape in shapes]
    for weight_grad, (rows, cols) in zip(pairs, moments(kernels, pairs, True, True), strict=True):
        weight, grad, _ = weight_grad
        assert_close(rows, *reference64(weight, grad, 0))
        assert_close(cols, *reference64(weight, grad, 1))
