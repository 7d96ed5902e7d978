"""Run by test_triton_interpreter.py, with TRITON_INTERPRET=1: the Triton kernels on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from taylor_kernels.backends import triton as kernels
from taylor_kernels.backends.triton import conv2d_fisher_plan
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher, linear_fisher
from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.ops.rademacher import rademacher_like
from tests.helpers import list_steps, mirror, probes
from tests.helpers.cases import (
    DTYPES,
    FisherCase,
    GateCase,
    MomentsCase,
    assert_close,
    filter_moments_cases,
    fisher_cases,
    fisher_reference64,
    gate_cases,
    gate_reference64,
    lay_out,
    random_bias,
    random_fisher_inputs,
    random_like_case,
    same_bits,
)
from tests.helpers.geometries import drawn_fisher_case
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
GATE_CASES = [
    *gate_cases(),
    GateCase("segments", (1, 1, 33001)),
    GateCase("row_blocks", (1, 300, 9), channel_dim=2, bias=True),
    GateCase("outer_rows", (2, 3, 4, 40), channel_dim=2, bias=True),
]
_LAST = {"layout": "channels_last", "grad_layout": "channels_last"}
FISHER_CASES = [
    *fisher_cases(),
    FisherCase("row_tiles", (2, 3, 4, 2), (131, 3, 1, 1)),
    FisherCase("col_tiles", (2, 136, 3, 3), (5, 136, 3, 1), padding=(1, 0), **_LAST),
    FisherCase("bands", (1, 72, 3, 3), (9, 8, 3, 3), padding=(1, 1), groups=9),
    FisherCase("chunk", (2, 8, 8, 8), (20, 8, 1, 1)),
    FisherCase("chunk_and_one", (2, 8, 5, 13), (20, 8, 1, 1), **_LAST),
    FisherCase("chunks", (2, 5, 14, 14), (20, 5, 3, 3), padding=(1, 1)),
    FisherCase("span", (3, 5, 16, 16), (20, 5, 1, 1)),
    FisherCase("span_and_one", (2, 20, 257, 1), (5, 20, 1, 1), **_LAST),
    FisherCase("spans", (3, 5, 24, 24), (9, 5, 3, 3), padding=(1, 1)),
    FisherCase("depthwise_chunks", (2, 5, 13, 13), (5, 1, 3, 3), padding=(1, 1), groups=5),
    FisherCase("depthwise_rows", (2, 72, 5, 5), (72, 1, 5, 5), padding=(2, 2), groups=72, **_LAST),
]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors start as NaN, so an output or a partial sum that nothing wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
@pytest.mark.parametrize("at", range(len(MOMENTS_CASES)), ids=lambda i: MOMENTS_CASES[i].name)
def test_moments(op: ParameterOp, at: int) -> None:
    case = MOMENTS_CASES[at]
    dtype = DTYPES[(at + (op is not FILTER)) % len(DTYPES)]
    tensors = random_like_case(case, dtype, count=op.lists)
    for dim in case.dims[at % 2 :]:  # (0, 1) always, else in turns
        op.check(tensors, dim, case.groups, "triton", at)


@pytest.mark.parametrize("seed", probes.SEEDS)
def test_rademacher(seed: int) -> None:
    counts = [1, 7, 8, 129, 4097, 9000, 0]
    like = [torch.empty(n, dtype=DTYPES[i % len(DTYPES)]) for i, n in enumerate(counts)]
    like.append(torch.empty(3, 8, 5, 5).to(memory_format=torch.channels_last))
    found = rademacher_like(like, seed=seed, backend="triton")
    for i, (tensor, signs) in enumerate(zip(like, found, strict=True)):
        assert signs.double().equal(probes.signs(tensor, seed, i)), i


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
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["float32", "mixed"])
def test_ranking_and_a_step(dtypes: tuple[torch.dtype, ...], ties: bool) -> None:
    """The reference's bits; but the interpreter cuts a bfloat16 off where a GPU rounds it."""

    def run(op: str, call: object) -> None:
        getattr(kernels, op)(call)

    weights, grads, momenta = list_steps.lists(dtypes, ties)
    for factors, signed in ((grads, False), (None, ties)):
        for count in list_steps.COUNTS:
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


def fisher(
    case: FisherCase, x: Tensor, dy: Tensor, weight: Tensor | None, tf32: bool = False
) -> Tensor:
    with torch.backends.cudnn.flags(allow_tf32=tf32):  # only picks other tiles here
        return conv2d_fisher(x, case.size, dy, *case.geometry, weight=weight, backend="triton")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 128), (torch.bfloat16, 256)])
def test_long_sums_of_one_sign_keep_their_precision(dtype: torch.dtype, width: int) -> None:
    case = FisherCase("long", (1, 16, 128, width), (16, 16, 1, 1))
    x, dy, _ = (t.abs() for t in random_fisher_inputs(case, dtype))
    assert_close(fisher(case, x, dy, None, tf32=True), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("at", range(len(FISHER_CASES)), ids=lambda i: FISHER_CASES[i].name)
def test_fisher(at: int) -> None:
    case = FISHER_CASES[at]
    x, dy, weight = random_fisher_inputs(case, DTYPES[at % len(DTYPES)])
    for scaled in (None, weight):
        got = fisher(case, x, dy, scaled, tf32=at % 2 == 0)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 20),
    filters=st.integers(1, 20),
    geometry=st.tuples(*4 * [st.tuples(st.integers(1, 3), st.integers(1, 3))]),
    image=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    layouts=st.tuples(*2 * [st.sampled_from(["contiguous", "channels_last"])]),
    dtype=st.sampled_from(DTYPES),
    with_weight=st.booleans(),
    tf32=st.booleans(),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fisher_of_any_geometry(
    batch, groups, channels, filters, geometry, image, layouts, dtype, with_weight, tf32
) -> None:
    kernel, stride, (pad_h, pad_w), dilation = geometry
    padding = pad_h - 1, pad_w - 1
    case = drawn_fisher_case(
        batch, groups, channels, filters, image, kernel, stride, padding, dilation, layouts
    )
    x, dy, weight = random_fisher_inputs(case, dtype)
    scaled = weight if with_weight else None
    assert_close(fisher(case, x, dy, scaled, tf32), *fisher_reference64(x, dy, case, scaled))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher_of_tokens(dtype: torch.dtype) -> None:
    x, dy = torch.randn(3, 70, 40, dtype=dtype), torch.randn(3, 70, 24, dtype=dtype)
    got = linear_fisher(x, dy, backend="triton")
    terms = [torch.einsum("nti,nto->noi", a.double(), b.double()).square().sum(0)
             for a, b in ((x, dy), (x.abs(), dy.abs()))]  # fmt: skip
    assert_close(got, *terms)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("groups", [1, 6])
def test_fisher_in_shares(groups: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FisherCase("shares", (7, 6, 4, 5), (6, 6 // groups, 3, 2), groups=groups)
    x, dy, weight = random_fisher_inputs(case, torch.bfloat16)
    for scaled in (None, weight):
        results = 6 if scaled is not None else weight.numel()
        monkeypatch.setattr(conv2d_fisher_plan, "WORKSPACE", splits * 4 * results)
        got = fisher(case, x, dy, scaled)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))
        assert same_bits(got, fisher(case, x, dy, scaled))


@pytest.mark.parametrize("name", ["conv3x3_channels_last", "depthwise", "grouped", "tokens"])
def test_fisher_by_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in FISHER_CASES if case.name == name)
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    expected = fisher(case, x, dy, None)
    monkeypatch.setattr(conv2d_fisher_plan, "WIDE", 0)
    assert same_bits(fisher(case, x, dy, None), expected)


def test_fisher_by_taps_and_corners_2_31_elements_from_the_image() -> None:
    x, dy = torch.randn(1, 2, 1, 2**16), torch.randn(1, 3, 2, 1)
    got = conv2d_fisher(
        x, (3, 2, 2, 1), dy, (2**15, 2**16), (2**15, 0), (2**15, 1), backend="triton"
    )
    # The lower tap of the upper position and the upper tap of the lower one are at x[..., 0, 0].
    expected = (dy[0].flip(1)[:, None] * x[0, :, 0, 0, None, None]).square()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("groups", [1, 2, 12])
def test_fisher_keeps_nan_and_infinity_in_their_filter(groups: int) -> None:
    case = FisherCase(
        "bad", (2, 12, 6, 6), (12, 12 // groups, 3, 3), (1, 1), (1, 1), (1, 1), groups
    )
    x, dy, weight = random_fisher_inputs(case, torch.float32)
    dy[0, 3, 2, 3], dy[1, 7, 3, 2] = float("inf"), float("nan")
    for scaled in (None, weight):
        got = fisher(case, x, dy, scaled)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))
        bad = ~got.flatten(1).isfinite().all(1) if scaled is None else ~got.isfinite()
        assert bad.nonzero().flatten().tolist() == [3, 7]


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
