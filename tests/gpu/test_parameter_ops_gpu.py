"""The ops over lists of parameters, and rademacher_like, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.filter_moments import filter_moments, needed_moments
from taylor_kernels.ops.hutchinson_moments import hutchinson_moments
from taylor_kernels.ops.rademacher import rademacher_like
from taylor_kernels.ops.second_order_moments import second_order_moments
from tests.helpers import cases, probes
from tests.helpers.graphs import NEEDS_GPU, check_replay, run_behind_a_late_copy
from tests.helpers.parameter_ops import EVERY_OP, GPU_CASES, SEED, ParameterOp, axes_of

pytestmark = NEEDS_GPU


@pytest.fixture(params=EVERY_OP, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> ParameterOp:
    return request.param


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_sums(case: cases.MomentsCase, dtype: torch.dtype, op: ParameterOp, backend: str) -> None:
    tensors = cases.random_like_case(case, dtype, "cuda", count=op.lists)
    for dim in case.dims:
        got = op.run(tensors, dim, case.groups, backend, stream=3)
        again = op.run(tensors, dim, case.groups, backend, stream=3)
        assert all(cases.same_bits(*both) for both in zip(got, again, strict=True))
        for axis, table in zip(axes_of(dim), got, strict=True):
            cases.assert_close(table, *op.reference64(tensors, axis, case.groups, stream=3))


def test_bits_do_not_depend_on_the_list(op: ParameterOp, backend: str) -> None:
    chosen = [case for case in GPU_CASES if len(case.shape) > 1]
    each = [
        cases.random_like_case(c, cases.DTYPES[i % 3], "cuda", count=op.lists)
        for i, c in enumerate(chosen)
    ]
    order = range(len(chosen))[::-1]
    lists = list(zip(*(each[i] for i in order), strict=True))
    groups = [chosen[i].groups for i in order]
    for dim in (0, 1, (0, 1)):
        got = op.call(lists, list(order), dim=dim, groups=groups, backend=backend)
        per_axis = got if isinstance(got, tuple) else (got,)
        for i, *tables in zip(order, *per_axis, strict=True):
            alone = op.run(each[i], dim, chosen[i].groups, backend, i)
            for table, expected in zip(tables, alone, strict=True):
                assert cases.same_bits(table.view_as(expected), expected), chosen[i].name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment(op: ParameterOp, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton picks another order of sums for unaligned tensors")
    for case in GPU_CASES:
        if case.layout != "contiguous":
            continue
        tensors = cases.random_like_case(case, dtype, "cuda", count=op.lists)
        moved = [cases.lay_out(t, "misaligned") for t in tensors]
        for dim in case.dims:
            here, there = (op.run(t, dim, case.groups, backend) for t in (tensors, moved))
            assert all(cases.same_bits(*both) for both in zip(here, there, strict=True)), case.name


def test_more_tensors_than_one_table_holds(op: ParameterOp, backend: str) -> None:
    shapes = [(1 + i % 5, 1 + i % 7) for i in range(900)]
    lists = [[torch.randn(s, device="cuda") for s in shapes] for _ in range(op.lists)]
    streams = list(range(len(shapes)))
    every = op.call(lists, streams, dim=(0, 1), backend=backend)
    for i, *tables in zip(streams, *every, strict=True):
        tensors = [each[i] for each in lists]
        for axis, table in enumerate(tables):
            table = table.view(len(table), op.sums)
            cases.assert_close(table, *op.reference64(tensors, axis, stream=i))


def test_nan_and_infinity_stay_in_their_filter(op: ParameterOp, backend: str) -> None:
    tensors = torch.randn(op.lists, 40, 30, 3, 3, device="cuda")
    tensors[0, 1, 2, 0, 0], tensors[-1, 3, 0, 1, 1] = float("nan"), float("inf")
    op.check(list(tensors), (0, 1), 1, backend)


def test_runs_on_the_current_stream(op: ParameterOp, backend: str) -> None:
    weight, *others = torch.randn(op.lists, 2048, 2048, device="cuda")

    def run(late: Tensor) -> tuple[Tensor, ...]:
        return op.run([weight, *others[:-1], late], (0, 1), 1, backend)

    got = run_behind_a_late_copy(run, others[-1])
    assert all(cases.same_bits(*both) for both in zip(got, run(others[-1]), strict=True))


def test_second_device(op: ParameterOp, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    tensors = list(torch.randn(op.lists, 300, 200, 3, 3, device="cuda:1"))
    assert all(table.device == tensors[0].device for table in op.run(tensors, (0, 1), 1, backend))
    op.check(tensors, (0, 1), 1, backend)


def test_backends_agree(op: ParameterOp) -> None:
    missing = [name for name in ("cuda", "triton") if not tk.available_backends()[name]]
    if missing:
        pytest.skip(f"no {missing[0]} backend here")
    for case in GPU_CASES:
        tensors = cases.random_like_case(case, torch.bfloat16, "cuda", count=op.lists)
        for dim in case.dims:
            both = (op.run(tensors, dim, case.groups, name) for name in ("cuda", "triton"))
            for axis, ours, theirs in zip(axes_of(dim), *both, strict=True):
                _, bound = op.reference64(tensors, axis, case.groups)
                cases.assert_close(ours, theirs.double(), bound)


@pytest.mark.parametrize("seed", probes.SEEDS)
def test_signs_are_those_of_every_device(seed: int, backend: str) -> None:
    shapes = [(1,), (7,), (129,), (64, 3, 7, 7), (1_000_003,), (5, 0)]
    like = [torch.empty(s, dtype=cases.DTYPES[i % 3], device="cuda") for i, s in enumerate(shapes)]
    like.append(torch.empty(16, 8, 3, 3, device="cuda").to(memory_format=torch.channels_last))
    found = rademacher_like(like, seed=seed, backend=backend)
    on_cpu = rademacher_like([t.cpu() for t in like], seed=seed)
    for i, (tensor, signs, cpu) in enumerate(zip(like, found, on_cpu, strict=True)):
        assert signs.cpu().equal(cpu)
        assert signs.cpu().double().equal(probes.signs(tensor, seed, i))


@pytest.mark.large
def test_random_signs_of_more_than_2_to_31_elements(backend: str) -> None:
    rows, columns = 2**16 + 1, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    weight = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    z = rademacher_like(weight, seed=SEED, backend=backend)
    end = rows * columns
    last = 1.0 - 2.0 * torch.from_numpy(probes.bits(SEED, 0, end - 999, end)).double()
    assert z.view(-1)[-999:].double().cpu().equal(last)
    arguments = {"seed": SEED, "backend": backend}
    by_rows, by_cols = hutchinson_moments(weight, z, dim=(0, 1), **arguments)
    assert by_rows.eq(columns).all()  # Σ z²: one wrong sign shows
    assert by_cols.eq(rows).all()
    q = second_order_moments(weight, z, z, backend=backend)
    assert q[:, 1].eq(columns / 4).all()


@pytest.mark.large
def test_moments_of_more_than_2_to_31_elements(backend: str) -> None:
    rows, columns = 2**16 + 1, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    weight = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(weight)
    grad[-1, -1], grad[0, 0], grad[rows // 2, 5] = 3, 2, -1
    by_rows, by_cols = filter_moments(weight, grad, dim=(0, 1), backend=backend)
    assert by_rows[-1].tolist() == [3, 9, 3, columns, 9]
    assert by_rows[rows // 2].tolist() == [-1, 1, 1, columns, 1]
    assert by_cols[-1].tolist() == [3, 9, 3, rows, 9]
    assert by_cols[0].tolist() == [2, 4, 2, rows, 4]
    alone = filter_moments(weight.view(1, -1), grad.view(1, -1), backend=backend)
    assert alone[0, [0, 1, 2, 4]].tolist() == [4, 14, 6, 14]
    assert abs(alone[0, 3].item() / (rows * columns) - 1) < 1e-6


def test_graph_replay_sees_new_values(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling memory is no part of what is captured
    shapes = [(256, 128, 3, 3), (1000, 512), (3, 500_000)]
    weights, grads, hvps = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(3))

    def run() -> list[Tensor]:
        rows, cols = filter_moments(weights, grads, dim=(0, 1), backend=backend)
        return [
            *rows,
            *cols,
            *second_order_moments(weights, grads, hvps, backend=backend),
            *hutchinson_moments(weights, hvps, seed=SEED, backend=backend),
            *rademacher_like(weights, seed=SEED, backend=backend),
        ]

    check_replay(run, [*grads, *hvps])


def test_nothing_is_written_over_moments_that_nobody_needs(backend: str) -> None:
    weights, grads = [torch.randn(5, 7, device="cuda")], [torch.randn(5, 7, device="cuda")]
    (table,) = needed_moments(weights, grads, moments=("gw2",), backend=backend)
    (chosen,) = filter_moments(weights, grads, moments=("gw2",), backend=backend)
    assert table.isfinite().all()
    assert chosen.isnan().sum() == 20
    assert cases.same_bits(table[:, 1], chosen[:, 1])
