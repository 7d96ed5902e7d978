"""second_order_moments, hutchinson_moments and rademacher_like on a GPU."""

from __future__ import annotations

import pytest
import torch

from taylor_kernels.ops.hutchinson_moments import hutchinson_moments
from taylor_kernels.ops.rademacher import rademacher_like
from taylor_kernels.ops.second_order_moments import second_order_moments
from tests.helpers import probes
from tests.helpers.cases import (
    DTYPES,
    MomentsCase,
    assert_close,
    lay_out,
    random_like_case,
    same_bits,
)
from tests.helpers.graphs import check_replay
from tests.helpers.parameter_ops import GPU_CASES, HUTCHINSON, SECOND_ORDER, SEED, ParameterOp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
OPS = pytest.mark.parametrize("op", [SECOND_ORDER, HUTCHINSON], ids=lambda op: op.name)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_sums(case: MomentsCase, dtype: torch.dtype, op: ParameterOp, backend: str) -> None:
    tensors = random_like_case(case, dtype, "cuda", count=op.lists)
    for dim in case.dims:
        got = op.run(tensors, dim, case.groups, backend, stream=3)
        again = op.run(tensors, dim, case.groups, backend, stream=3)
        assert all(same_bits(*both) for both in zip(got, again, strict=True))
        for axis, table in zip(dim if isinstance(dim, tuple) else (dim,), got, strict=True):
            assert_close(table, *op.reference64(tensors, axis, case.groups, stream=3))


@OPS
def test_bits_do_not_depend_on_the_list(op: ParameterOp, backend: str) -> None:
    cases = [case for case in GPU_CASES if len(case.shape) > 1]
    each = [random_like_case(c, DTYPES[i % 3], "cuda", count=op.lists) for i, c in enumerate(cases)]
    lists = list(zip(*each[::-1], strict=True))
    groups = [case.groups for case in cases[::-1]]
    streams = list(range(len(cases)))[::-1]
    got = op.call(lists, streams, dim=(0, 1), groups=groups, backend=backend)
    for i, (case, rows, cols) in enumerate(zip(cases[::-1], *got, strict=True)):
        tensors = each[len(cases) - 1 - i]
        alone = op.run(tensors, (0, 1), case.groups, backend, streams[i])
        assert same_bits(rows.view_as(alone[0]), alone[0]), case.name
        assert same_bits(cols.view_as(alone[1]), alone[1]), case.name


@OPS
def test_bits_do_not_depend_on_alignment(op: ParameterOp, backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton picks another order of sums for unaligned tensors")
    for i, case in enumerate(GPU_CASES):
        if case.layout != "contiguous":
            continue
        tensors = random_like_case(case, DTYPES[i % 3], "cuda", count=op.lists)
        moved = [lay_out(t, "misaligned") for t in tensors]
        for dim in case.dims:
            here, there = (op.run(t, dim, case.groups, backend) for t in (tensors, moved))
            assert all(same_bits(*both) for both in zip(here, there, strict=True)), case.name


@pytest.mark.parametrize("seed", probes.SEEDS)
def test_signs_are_those_of_every_device(seed: int, backend: str) -> None:
    shapes = [(1,), (7,), (129,), (64, 3, 7, 7), (1_000_003,), (5, 0)]
    like = [torch.empty(s, dtype=DTYPES[i % 3], device="cuda") for i, s in enumerate(shapes)]
    like.append(torch.empty(16, 8, 3, 3, device="cuda").to(memory_format=torch.channels_last))
    found = rademacher_like(like, seed=seed, backend=backend)
    on_cpu = rademacher_like([t.cpu() for t in like], seed=seed)
    for i, (tensor, signs, cpu) in enumerate(zip(like, found, on_cpu, strict=True)):
        assert signs.cpu().equal(cpu)
        assert signs.cpu().double().equal(probes.signs(tensor, seed, i))


def test_more_than_2_to_31_elements(backend: str) -> None:
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


def test_graph_replay_sees_new_values(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling memory is no part of what is captured
    shapes = [(256, 128, 3, 3), (1000, 512), (3, 500_000)]
    weights, grads, hvps = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(3))

    def run() -> list[torch.Tensor]:
        z = rademacher_like(weights, seed=SEED, backend=backend)
        return [
            *second_order_moments(weights, grads, hvps, backend=backend),
            *hutchinson_moments(weights, hvps, seed=SEED, backend=backend),
            *z,
        ]

    check_replay(run, [*grads, *hvps])
