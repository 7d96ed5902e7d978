"""The Triton kernels of lists of parameters and of gates, run by test_triton_interpreter.py."""

from __future__ import annotations

import math
import os

import pytest
import torch

from taylor_kernels.backends import triton as kernels
from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.ops.rademacher import rademacher_like
from tests.helpers import list_steps, mirror, probes
from tests.helpers.cases import (
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
    same_bits,
)
from tests.helpers.parameter_ops import EVERY_OP, FILTER, ParameterOp

assert os.environ.get("TRITON_INTERPRET") == "1"

#: The interpreter is slow, so the cases take turns with the dtypes.
MOMENTS_CASES = [
    *filter_moments_cases(),
    MomentsCase("aligned_tails", (2, 2056)),
    MomentsCase("grid_aligned", (20, 136)),
    MomentsCase("segments", (33001,)),
    MomentsCase("row_blocks", (260, 2)),
]
#: Sums down more columns take a program for every 16 of each kind: those of one kind are enough.
WIDE = 1000
GATE_CASES = [
    *gate_cases(),
    GateCase("segments", (1, 1, 33001)),
    GateCase("row_blocks", (1, 300, 9), channel_dim=2, bias=True),
    GateCase("outer_rows", (2, 3, 4, 40), channel_dim=2, bias=True),
]


@pytest.mark.sample(len(MOMENTS_CASES) // 2, covering=False)
@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
@pytest.mark.parametrize("at", range(len(MOMENTS_CASES)), ids=lambda i: MOMENTS_CASES[i].name)
def test_moments(op: ParameterOp, at: int) -> None:
    """Both axes at once by every op; one axis alone by ops in turns, as they share the plan."""
    case = MOMENTS_CASES[at]
    turn = at + EVERY_OP.index(op)
    tensors = random_like_case(case, DTYPES[turn % len(DTYPES)], count=op.lists)
    *alone, together = case.dims
    dims = (*alone[turn % 2 :][:1], together)
    if math.prod(case.shape[1:]) > WIDE and op.sums > 1:
        dims = (0,)
    for dim in dims:
        op.check(tensors, dim, case.groups, "triton", at)


@pytest.mark.parametrize("seed", probes.SEEDS)
def test_rademacher(seed: int) -> None:
    counts = [1, 7, 8, 129, 4097, 9000, 0]
    like = [torch.empty(n, dtype=DTYPES[i % len(DTYPES)]) for i, n in enumerate(counts)]
    like.append(torch.empty(3, 8, 5, 5).to(memory_format=torch.channels_last))
    found = rademacher_like(like, seed=seed, backend="triton")
    for i, (tensor, signs) in enumerate(zip(like, found, strict=True)):
        assert signs.double().equal(probes.signs(tensor, seed, i)), i


@pytest.mark.sample(len(mirror.RULES_OF_TESTS) // 2, covering=False)
@pytest.mark.parametrize("at", range(len(mirror.RULES_OF_TESTS)))
def test_mirror_steps(at: int) -> None:
    """Aligned whole tiles, tails, misaligned views; with and without a gradient."""
    rule = mirror.RULES_OF_TESTS[at]
    dtype = DTYPES[at % len(DTYPES)]
    each = [mirror.random_tensors(rule, shape, dtype) for shape in ((1024,), (3, 5), (1031,))]
    each[2] = each[2]._replace(param=lay_out(each[2].param, "misaligned"))
    before = [tensors.copies() for tensors in each]
    mirror.run([rule] * len(each), each, "triton")
    for old, new in zip(before, each, strict=True):
        mirror.check(rule, old, new)
    if rule.planes:
        mirror.check_projections(rule, each, "triton")


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_ranking_and_a_step(ties: bool) -> None:
    """The reference's bits; but the interpreter cuts a bfloat16 off where a GPU rounds it."""

    def run(op: str, call: object) -> None:
        getattr(kernels, op)(call)

    weights, grads, momenta = list_steps.lists(DTYPES, ties)
    for factors, signed, count in ((grads, False, 900), (None, True, list_steps.COUNTS[-1])):
        tables = [
            list_steps.threshold(one, weights, factors, count, signed)
            for one in (list_steps.by_reference, run)
        ]
        assert tables[0].equal(tables[1]), (count, signed)
    for rows in (False, True):
        factors = None if rows else grads
        table = list_steps.threshold(list_steps.by_reference, weights, factors, 900, False)
        both = [
            list_steps.stepped(one, weights, grads, momenta, table, rows)
            for one in (list_steps.by_reference, run)
        ]
        for expected, found in zip(*both, strict=True):
            bits = 1 if found.dtype is torch.bfloat16 else 0
            torch.testing.assert_close(found, expected, rtol=bits * 2**-7, atol=0)


@pytest.mark.sample(len(GATE_CASES) // 2, covering=False)
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
    FILTER.check([weight, grad], (0, 1), 1, "triton")
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
            alone = FILTER.run(pair, dim, case.groups, "triton")
            assert all(same_bits(*both) for both in zip(tables, alone, strict=True)), case.name
