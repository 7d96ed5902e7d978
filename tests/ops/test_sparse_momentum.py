"""sparse_momentum: the step of GSM, in place, against float64 and with equal bits everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from taylor_kernels.ops.global_threshold import global_threshold
from taylor_kernels.ops.sparse_momentum import sparse_momentum
from tests.ops.test_global_threshold import BACKENDS, FLOATS

SETTINGS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
SHAPES = [(7, 5), (3,), (2, 4, 3, 3), (33_000,), (1,)]
RANKED = [True, False, True, True, True]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of any dtype: -0 and 0 differ."""
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def inputs(dtype: torch.dtype, ties: bool = False) -> tuple[list[Tensor], ...]:
    lists = tuple([torch.randn(s).to(dtype) for s in SHAPES] for _ in range(3))
    return tuple([t.round() for t in each] for each in lists) if ties else lists


def step(w, g, z, table, ranked=RANKED, backend=None, row_scores=None, **changes):
    each = {name: [value] * len(w) for name, value in (SETTINGS | changes).items()}
    sparse_momentum(w, g, z, table, ranked=ranked, backend=backend, row_scores=row_scores, **each)


def expected64(w, g, z, count, ranked=RANKED) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, of the values as they are in their dtype; scores in float32."""
    flat = torch.cat(
        [
            (a.float() * b.float()).abs().reshape(-1)
            for a, b, r in zip(w, g, ranked, strict=True)
            if r
        ]
    )
    order = flat.sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    masks = iter(mask.split([t.numel() for t, r in zip(w, ranked, strict=True) if r]))
    weights, momenta = [], []
    for a, b, c, r in zip(w, g, z, ranked, strict=True):
        active = next(masks).view(a.shape) if r else torch.ones_like(a, dtype=torch.bool)
        moved = SETTINGS["momentum"] * c.double() + SETTINGS["weight_decay"] * a.double()
        moved = moved + torch.where(active, b.double(), 0.0)
        momenta.append(moved)
        weights.append(a.double() - SETTINGS["lr"] * moved)
    return weights, momenta


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_step(dtype, ties, each_isa):
    w, g, z = inputs(dtype, ties)
    count = 700
    weights, momenta = expected64(w, g, z, count)
    found = []
    for name in BACKENDS:
        mine = [[t.clone() for t in each] for each in (w, g, z)]
        table = global_threshold(mine[0], count, factors=mine[1], ranked=RANKED, backend=name)
        step(*mine, table, backend=name)
        assert all(a.equal(b) for a, b in zip(mine[1], g, strict=True))
        for got, want in zip(mine[0] + mine[2], weights + momenta, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=16 * eps)
        found.append(mine[0] + mine[2])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows(each_isa):
    """The rows of greatest |score| are reached, the others decay."""
    w = [torch.randn(6, 5), torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)]
    g, z = [torch.randn_like(t) for t in w], [torch.zeros_like(t) for t in w]
    rows = [torch.randn(6), torch.randn(8)]
    found = []
    for name in BACKENDS:
        mine = [[t.clone() for t in each] for each in (w, g, z)]
        table = global_threshold(rows, 5, backend=name)
        step(*mine, table, [True, True], name, rows)
        found.append(mine[0] + mine[2])
        kept = torch.cat(rows).abs().topk(5).indices
        active = torch.zeros(14, dtype=torch.bool)
        active[kept] = True
        for i, part in enumerate(active.split([6, 8])):
            moved = mine[2][i] - SETTINGS["weight_decay"] * w[i]
            reached = (moved.abs() > 1e-6).flatten(1).any(1)
            assert reached.equal(part)
            torch.testing.assert_close(moved[part], g[i][part], rtol=1e-5, atol=1e-6)
    assert all(same_bits(a, b) for a, b in zip(*found[:2], strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_changed_where_a_score_is_not_finite(name):
    w, g, z = inputs(torch.float32)
    g[1][0] = math.inf
    before = [t.clone() for t in w + z]
    table = global_threshold(w, 10, factors=g, ranked=RANKED, backend=name)
    step(w, g, z, table, backend=name)
    assert all(same_bits(a, b) for a, b in zip(w + z, before, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_of_any_kind_are_changed_in_place(name):
    """Weights, gradients and momenta that lie differently: the values of contiguous ones."""
    plain = [torch.randn(6, 4, 5, 3) for _ in range(3)]
    kinds = [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    expected = [t.clone() for t in plain]
    table = global_threshold(expected[:1], 50, factors=expected[1:2], backend=name)
    step([expected[0]], [expected[1]], [expected[2]], table, [True], name)
    for i in range(3):
        w, g, z = (kinds[(i + j) % 3](t.clone()) for j, t in enumerate(plain))
        pointer = w.data_ptr()
        table = global_threshold([w], 50, factors=[g], backend=name)
        step([w], [g], [z], table, [True], name)
        assert w.data_ptr() == pointer
        assert same_bits(w.contiguous(), expected[0])
        assert same_bits(z.contiguous(), expected[2])


def test_a_changed_weight_cannot_be_used_by_an_old_graph():
    w = torch.randn(3, 3, requires_grad=True)
    loss = w.square().sum()
    with torch.no_grad():
        table = global_threshold([w], 2, factors=[torch.ones_like(w)])
        step([w], [torch.ones_like(w)], [torch.zeros_like(w)], table, [True])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mistakes_are_named():
    w, g, z = ([torch.ones(2, 2)] for _ in range(3))
    table = global_threshold(w, 1)
    for call, message in (
        (lambda: step(w, g, [torch.ones(2)], table, [True]), r"momenta\[0\]: shape"),
        (lambda: step(w, g, z, table[:2], [True]), "table: expected what global_threshold"),
        (lambda: step(w, g, z, table, [True, False]), "ranked: 2 values for 1"),
        (lambda: step(w, g, z, table, [True], None, [torch.ones(3)]), r"row_scores\[0\]: expected"),
        (lambda: step([], [], [], table, []), "weights: no tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert w[0].equal(torch.ones(2, 2))
