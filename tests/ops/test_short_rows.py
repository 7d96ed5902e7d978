"""Rows of few elements, of which the CPU kernels sum several at once: the bits of one order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taylor_kernels.backends.native import _native
from tests.helpers import probes
from tests.helpers.cases import DTYPES, same_bits
from tests.helpers.parameter_ops import EVERY_OP, SEED, ParameterOp

LANES = 16


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


@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, LANES),
    dtype=st.sampled_from(DTYPES),
    at=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_every_set_adds_them_in_one_order(op, rows, width, dtype, at, seed):
    """From an element on at which no register begins, and beside numbers that no sum may see."""
    torch.manual_seed(seed)
    tensors = []
    for _ in range(op.lists):
        flat = torch.full((at + rows * width + LANES,), torch.nan, dtype=dtype)
        tensor = flat[at : at + rows * width].view(rows, width)
        tensors.append(tensor.copy_(torch.randn(rows, width)))
    expected = torch.stack([in_order(terms) for terms in products(op, tensors)], 1)
    for table in on_every_set(lambda: op.run(tensors, 0, 1, "cpu")[0]):
        assert same_bits(table, expected)
