"""Rows of which the CPU kernels sum several at once: the bits of one order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.backends.native import _native
from tests.helpers import probes
from tests.helpers.cases import DTYPES, same_bits
from tests.helpers.parameter_ops import EVERY_OP, SEED, ParameterOp

LANES = 16
#: Elements of a row that are summed in float32 before float64, without columns and with them.
RUN, STRIP = 2048, 512


def products(op: ParameterOp, tensors: list[Tensor]) -> list[Tensor]:
    """What each sum adds up, rounded as the kernels round it where all else is zero."""
    w, *others = (tensor.float() for tensor in tensors)
    if op.name == "hutchinson_moments":
        return [w * (probes.signs(tensors[0], SEED).float() * others[0]) * w]
    if op.name == "second_order_moments":
        q = (others[0] - 0.5 * others[1]) * w
        return [q, q * q]
    gw = others[0] * w
    return [gw, gw * gw, gw.abs(), w * w, others[0] * others[0]]


def in_order(terms: Tensor) -> Tensor:
    """[rows, up to 16] -> [rows]: lane i with i + 8, then + 4, + 2 and + 1."""
    lanes = torch.zeros(len(terms), LANES)
    lanes[:, : terms.size(1)] = terms
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0]


def on_every_set(run: Callable[[], Tensor]) -> list[Tensor]:
    before, found = _native.cpu_isa(), []
    try:
        for isa in _native.cpu_isas():
            _native.set_cpu_isa(isa)
            found.append(run())
    finally:
        _native.set_cpu_isa(before)
    return found


def amid_nan(
    count: int, rows: int, width: int, dtype: torch.dtype, at: int, seed: int
) -> list[Tensor]:
    """Random matrices from element `at` of buffers on, beside numbers that no sum may see."""
    torch.manual_seed(seed)
    tensors = []
    for _ in range(count):
        flat = torch.full((at + rows * width + LANES,), torch.nan, dtype=dtype)
        tensor = flat[at : at + rows * width].view(rows, width)
        tensors.append(tensor.copy_(torch.randn(rows, width)))
    return tensors


@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, LANES),
    dtype=st.sampled_from(DTYPES),
    at=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_every_set_adds_them_in_one_order(op, rows, width, dtype, at, seed):
    """From an element on at which no register begins."""
    tensors = amid_nan(op.lists, rows, width, dtype, at, seed)
    expected = torch.stack([in_order(terms) for terms in products(op, tensors)], 1)
    for table in on_every_set(lambda: op.run(tensors, 0, 1, "cpu")[0]):
        assert same_bits(table, expected)


@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
@given(
    rows=st.integers(1, 300),
    width=st.integers(LANES + 1, 4 * LANES) | st.integers(LANES + 1, STRIP),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    at=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_longer_rows_have_the_bits_that_they_have_with_columns(op, rows, width, dtype, at, seed):
    """Where columns are asked for too, each row is added up by other code."""
    tensors = amid_nan(op.lists, rows, width, dtype, at, seed)
    alone = on_every_set(lambda: op.run(tensors, 0, 1, "cpu")[0])
    with_columns = on_every_set(lambda: op.run(tensors, (0, 1), 1, "cpu")[0])
    assert all(map(same_bits, alone, with_columns))


@pytest.mark.parametrize("width", [RUN - 1, RUN, RUN + 1])
def test_rows_of_about_a_run_have_the_bits_of_each_by_itself(width):
    w, g = amid_nan(2, 7, width, torch.float32, 1, seed=width)
    for together, apart in zip(
        on_every_set(lambda: tk.filter_moments(w, g)),
        on_every_set(
            lambda: torch.cat(
                [tk.filter_moments(a[None], b[None]) for a, b in zip(w, g, strict=True)]
            )
        ),
        strict=True,
    ):
        assert same_bits(together, apart)
