"""The Triton kernels of conv2d_fisher, run by test_triton_interpreter.py."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from taylor_kernels.backends.triton import conv2d_fisher_plan
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher, linear_fisher
from taylor_kernels.ops.example_norms import conv2d_example_norms
from tests.helpers.cases import DTYPES, EPS32, assert_close, same_bits
from tests.helpers.example_norms import norms_reference64
from tests.helpers.fisher_cases import (
    FisherCase,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
)
from tests.helpers.geometries import drawn_fisher_case
from tests.helpers.samples import some

assert os.environ.get("TRITON_INTERPRET") == "1"

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


def fisher(
    case: FisherCase, x: Tensor, dy: Tensor, weight: Tensor | None, tf32: bool = False
) -> Tensor:
    with torch.backends.cudnn.flags(allow_tf32=tf32):  # only picks other tiles here
        return conv2d_fisher(x, case.size, dy, *case.geometry, weight=weight, backend="triton")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 128)])
def test_long_sums_of_one_sign_keep_their_precision(dtype: torch.dtype, width: int) -> None:
    """128 spans are added one after another: an error of 3 units root mean square, of which one of
    256 sums has eight times as much once in a lifetime."""
    case = FisherCase("long", (1, 16, 128, width), (16, 16, 1, 1))
    x, dy, _ = (t.abs() for t in random_fisher_inputs(case, dtype))
    got = fisher(case, x, dy, None, tf32=True)
    reference, bound = fisher_reference64(x, dy, case)
    assert_close(got, reference, bound, c=24)
    assert ((got.double() - reference) / (EPS32 * bound)).square().mean() < 6**2


@pytest.mark.sample(len(FISHER_CASES) // 2, covering=False)
@pytest.mark.parametrize("at", range(len(FISHER_CASES)), ids=lambda i: FISHER_CASES[i].name)
def test_fisher(at: int) -> None:
    """With a weight or without in turns: what is read does not depend on it. The emulated kernels
    in CUDA take the same shapes, and test_fisher_of_any_geometry takes others."""
    case = FISHER_CASES[at]
    x, dy, weight = random_fisher_inputs(case, DTYPES[at % len(DTYPES)])
    scaled = weight if at // 2 % 2 else None
    got = fisher(case, x, dy, scaled, tf32=at % 2 == 0)
    assert_close(got, *fisher_reference64(x, dy, case, scaled))


#: The kernel is the same but for its end, where it adds over tiles, bands and spans: whether the
#: examples are taken one at a time. Each run draws half of them.
NORM_CASES = {
    "one_element": True, "empty_batch": False, "conv3x3": False, "conv3x3_channels_last": True,
    "conv1x1_stride": False, "uneven_geometry": False, "depthwise_channels_last": True,
    "grouped": False, "tokens": False, "many_tokens": True, "many_examples": False,
    "row_tiles": False, "col_tiles": False, "bands": True, "chunk_and_one": False, "spans": False,
    "depthwise_chunks": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "one_at_a_time"), some([*NORM_CASES.items()], 9))
def test_example_norms(name: str, one_at_a_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    at, case = next((i, case) for i, case in enumerate(FISHER_CASES) if case.name == name)
    x, dy, _ = random_fisher_inputs(case, DTYPES[at % len(DTYPES)])
    if one_at_a_time:
        monkeypatch.setattr(conv2d_fisher_plan, "WORKSPACE", 1)
    got = conv2d_example_norms(x, case.size, dy, *case.geometry, backend="triton")
    assert_close(got, *norms_reference64(x, dy, case))


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
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
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


#: Of each kind of address; each run draws two.
WIDE = ["conv3x3_channels_last", "depthwise", "grouped", "tokens"]


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


@pytest.mark.parametrize("name", some(WIDE, 2))
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
