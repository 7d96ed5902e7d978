"""global_threshold: exactly so many, the greatest, by position where equal; on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.global_threshold import global_threshold, greatest_masks

BACKENDS = [
    name
    for name, found in tk.available_backends().items()
    if found and name in ("cpu", "reference")
]
#: Elements of a task of csrc/cpu/global_threshold.cpp, of a chunk of csrc/cuda/global_threshold.cu.
TASK, CHUNK = 1 << 16, 1 << 14
#: From so many elements on, the CPU looks for the last score in a window (csrc/cpu/score_window.h).
WINDOW = 1 << 22
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def chosen64(scores: list[Tensor], count: int) -> list[Tensor]:
    """By a stable sort of all scores: the specification, for scores that float32 holds."""
    flat = torch.cat([s.double().reshape(-1) for s in scores])
    order = flat.sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    pieces = mask.split([s.numel() for s in scores])
    return [piece.view(s.shape) for piece, s in zip(pieces, scores, strict=True)]


def check(a: list[Tensor], count: int, b: list[Tensor] | None = None, signed: bool = False) -> None:
    if b is None:
        scores = a if signed else [t.abs() for t in a]
    else:
        scores = [(x.float() * y.float()).abs() for x, y in zip(a, b, strict=True)]
    expected = chosen64(scores, count)
    tables = [
        global_threshold(a, count, factors=b, signed=signed, backend=name) for name in BACKENDS
    ]
    assert all(table.equal(tables[0]) for table in tables), tables
    assert tables[0][2] == 0
    found = greatest_masks(a, tables[0], factors=b, signed=signed)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))
    assert sum(int(mask.sum()) for mask in found) == count


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("shapes", [[(1,)], [(7, 5), (3,), (2, 4, 3, 3)], [(257,), (0, 3), (1, 1)]])
def test_products(dtype, shapes, each_isa):
    a, b = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
    total = sum(math.prod(s) for s in shapes)
    for count in {1, (total + 1) // 2, total}:
        check(a, count, b)


@pytest.mark.sample(10)
@pytest.mark.parametrize("values", ["normal", "few", "zeros", "denormal", "one bit apart"])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("size", [CHUNK, TASK])
def test_around_a_task(values, extra, size):
    """Two tensors that reach over it; ties in one, in many and in all of them."""
    shapes = [size + extra, 2 * size + 3]
    a = [torch.randn(n) for n in shapes]
    if values == "few":
        a = [t.round() for t in a]
    elif values == "zeros":
        a = [t * (torch.rand_like(t) < 0.001) for t in a]
    elif values == "denormal":
        a = [t * 1e-40 for t in a]
    elif values == "one bit apart":
        a = [(1 + torch.randint(3, t.shape) * 2**-23) for t in a]
    total = sum(shapes)
    for count in (1, total // 60, total // 2, total - 1):
        check(a, count)


@pytest.mark.parametrize(
    "values", ["normal", "few", "some equal", "ascending", "periodic", "one far"]
)
def test_many_elements(values):
    """Scores that a sample says much of, and such as mislead it: then all are read again."""
    size = WINDOW + 70_001
    a = torch.randn(size)
    if values == "few":
        a = a.round()
    elif values == "some equal":
        a = a.round(decimals=3)
    elif values == "ascending":
        a = torch.arange(size, dtype=torch.float32)
    elif values == "periodic":  # rows of 1,024, of which a column in a hundred is great
        a = torch.where(torch.arange(size) % 1024 < 10, 50, 1) * a
    elif values == "one far":
        a = torch.zeros(size)
        a[12_345] = 1.0
    order = a.abs().sort(descending=True, stable=True).indices
    for count in (1, size // 60, size // 2, size):
        check_sorted([a[: WINDOW - 5], a[WINDOW - 5 :].view(2, -1)], order, count)


@pytest.mark.sample
@pytest.mark.parametrize("signed", [False, True])
def test_many_elements_on_every_instruction_set(signed, each_isa):
    a, b = torch.randn(WINDOW), torch.randn(WINDOW)
    scores = a if signed else (a * b).abs()
    order = scores.sort(descending=True, stable=True).indices
    check_sorted([a], order, WINDOW // 3, None if signed else [b], signed)


def check_sorted(
    a: list[Tensor],
    order: Tensor,
    count: int,
    b: list[Tensor] | None = None,
    signed: bool = False,
) -> None:
    """`check` of the CPU's kernel alone, by an order that is known."""
    table = global_threshold(a, count, factors=b, signed=signed, backend=BACKENDS[0])
    found = torch.cat([m.flatten() for m in greatest_masks(a, table, factors=b, signed=signed)])
    assert int(found.sum()) == count
    assert bool(found[order[:count]].all())


@pytest.mark.parametrize("where", [0, 2])
def test_the_first_of_many_elements_that_is_not_finite_is_named(where, each_isa):
    a = [torch.randn(n) for n in (9, WINDOW, TASK + 1)]
    a[2][-1] = a[where][3] = math.inf
    table = global_threshold(a, 1000, ranked=[False, True, True], backend=BACKENDS[0])
    assert int(table[2]) == len(a) - where


@settings(max_examples=60)
@given(st.data())
def test_any_scores(data):
    values = st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4028234663852886e38]),
    )
    lists = data.draw(st.lists(st.lists(values, min_size=1, max_size=40), min_size=1, max_size=4))
    a = [torch.tensor(each, dtype=torch.float32) for each in lists]
    count = data.draw(st.integers(1, sum(map(len, lists))))
    signed = data.draw(st.booleans())
    check(a, count, signed=signed)


def test_strides_change_nothing_but_the_order_of_positions():
    """Contiguous and channels_last are read in place; other tensors as if they were contiguous."""
    base = torch.randn(4, 6, 5, 3).round()
    turned = base.to(memory_format=torch.channels_last)
    step = torch.randn(8, 12)[::2, ::3].round()
    for a in ([base, step], [turned, step]):
        lying = [a[0].permute(0, 2, 3, 1) if a[0] is turned else a[0], a[1].contiguous()]
        table = global_threshold(a, 50)
        masks = greatest_masks(a, table)
        expected = chosen64([t.abs() for t in lying], 50)
        assert masks[1].equal(expected[1])
        got = masks[0].permute(0, 2, 3, 1) if a[0] is turned else masks[0]
        assert got.equal(expected[0])


def test_what_is_not_ranked_is_only_looked_at():
    a = [torch.full((9,), 100.0), torch.randn(30), torch.full((5,), 100.0)]
    b = [torch.ones_like(t) for t in a]
    ranked = [False, True, False]
    alone = global_threshold(a[1:2], 7, factors=b[1:2])
    for name in BACKENDS:
        table = global_threshold(a, 7, factors=b, ranked=ranked, backend=name)
        assert table.equal(alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_the_first_tensor_that_is_not_finite_is_named(bad, where, each_isa):
    a = [torch.randn(n) for n in (40, 70_000, 5, 300)]
    b = [torch.randn_like(t) for t in a]
    ranked = [True, True, False, True]
    b[where][-1] = bad
    b[3][0] = math.nan  # and a later one
    for name in BACKENDS:
        table = global_threshold(a, 9, factors=b, ranked=ranked, backend=name)
        assert int(table[2]) == len(a) - where


def test_products_that_overflow_are_not_finite_and_doubles_that_do_not_are():
    huge = [torch.tensor([1e30, 1.0]), torch.tensor([1e200, 3.0], dtype=torch.float64)]
    for name in BACKENDS:
        assert int(global_threshold(huge[:1], 1, factors=huge[:1], backend=name)[2]) == 1
        table = global_threshold(huge[1:], 1, backend=name)
        assert int(table[2]) == 0
        assert greatest_masks(huge[1:], table)[0].tolist() == [True, False]


def test_threads_change_no_bit(keep_threads):
    for more in (0, WINDOW):
        a = [torch.randn(300_000).round(decimals=1), torch.randn(200_000 + more)]
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(global_threshold(a, 60_000, backend=BACKENDS[0]))
        assert all(table.equal(found[0]) for table in found)


def test_mistakes_are_named():
    a = [torch.ones(3), torch.ones(2)]
    for call, error, message in (
        (lambda: global_threshold(a, 0), ValueError, "count: 0 is not between 1 and the 5"),
        (lambda: global_threshold(a, 6), ValueError, "count: 6"),
        (lambda: global_threshold([], 1), ValueError, "tensors: no tensors"),
        (lambda: global_threshold([torch.ones(2).int()], 1), TypeError, r"tensors\[0\]: dtype"),
        (lambda: global_threshold(a, 1, factors=a[:1]), ValueError, "factors: 1 tensors for 2"),
        (lambda: global_threshold(a, 1, factors=a[::-1]), ValueError, r"factors\[0\]: shape"),
        (lambda: global_threshold(a, 1, ranked=[True]), ValueError, "ranked: 1 values"),
        (lambda: global_threshold(a, 1, ranked=[False] * 2), ValueError, "the 0 ranked"),
        (lambda: global_threshold(a, 1, backend="gpu"), ValueError, "backend"),
    ):
        with pytest.raises(error, match=message):
            call()
