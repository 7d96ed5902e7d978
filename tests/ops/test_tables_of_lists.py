"""The tables of a list: a plain list of plain tensors, which share memory and nothing else."""

from __future__ import annotations

import copy
import gc
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import taylor_kernels as tk
from taylor_kernels.backends import native
from tests.helpers.cases import same_bits

SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple), min_size=1, max_size=70
)


def pair(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    weights, grads = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(2))
    return weights, grads


def five_sums(w: Tensor, g: Tensor, axis: int) -> Tensor:
    w, g = w.double().movedim(axis, 0).flatten(1), g.double().movedim(axis, 0).flatten(1)
    terms = (w * g, (w * g) ** 2, (w * g).abs(), w**2, g**2)
    return torch.stack([term.sum(1) for term in terms], 1)


@pytest.mark.parametrize("direct", [True, False])
@given(shapes=SHAPES, dtype=st.sampled_from([torch.float32, torch.float64]), data=st.data())
@settings(max_examples=25)
def test_each_is_the_table_of_its_tensor(direct, shapes, dtype, data):
    dim = data.draw(st.sampled_from([0, 1, (0, 1)]))
    weights, grads = pair(shapes, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "plans_calls", direct and native.plans_calls)
        both = tk.filter_moments(weights, grads, dim=dim)
    for axis, tables in zip(dim, both, strict=True) if isinstance(dim, tuple) else [(dim, both)]:
        assert type(tables) is list
        assert len(tables) == len(shapes)
        for w, g, table in zip(weights, grads, tables, strict=True):
            assert type(table) is Tensor
            assert table.is_contiguous()
            assert (table.dtype, table.shape) == (dtype, (w.shape[axis], 5))
            terms = five_sums(w, g.abs(), axis)[:, [2, 1, 2, 3, 4]]  # Σ|terms|
            error = (table.double() - five_sums(w, g, axis)).abs()
            assert (error <= 16 * torch.finfo(dtype).eps * terms).all()


@pytest.mark.parametrize("count", [1, 2, 61])
def test_their_memory_goes_with_the_last_of_them(count):
    weights, grads = pair([(5, 3)] * count, torch.float32)
    tables = tk.filter_moments(weights, grads)
    others = [torch.zeros(1) for _ in tables]  # as often referred to, whatever Python counts here
    assert [table._use_count() for table in tables] == [other._use_count() for other in others]
    counts = [[sys.getrefcount(one) for one in each] for each in (tables, others)]
    assert counts[0] == counts[1]
    kept = tables[count // 2]
    expected = kept.clone()
    memory = StorageWeakRef(kept.untyped_storage())
    del tables
    gc.collect()
    for _ in range(50):  # whatever else is made now must not lie there
        tk.filter_moments(grads, grads)
        torch.full((5 * count, 5), torch.nan)
    assert same_bits(kept, expected)
    assert not memory.expired()
    del kept
    assert memory.expired()


def test_a_pytorch_that_lacks_what_is_asked_of_it_is_done_without(monkeypatch):
    """The question is one of its own, asked when the native module is told of it."""
    weights, grads = pair([(4, 3), (2, 5)], torch.float64)
    expected = tk.filter_moments(weights, grads)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "_use_count", property(lambda _: 1 / 0), raising=False)
        assert not native._connect()
        found = tk.filter_moments(weights, grads)
    assert native._connect() == native.plans_calls
    assert all(map(same_bits, found, expected))


def test_one_may_change_without_the_others():
    weights, grads = pair([(4, 3), (2, 5), (6, 1)], torch.float32)
    first, middle, last = tk.filter_moments(weights, grads)
    scale = torch.ones(5, requires_grad=True)
    product = (first * scale).sum()  # keeps `first` for its backward pass
    before = [first.clone(), last.clone()]
    middle.fill_(torch.nan)
    middle.resize_(0)
    middle.label = "one's own"
    product.backward()
    assert [first._version, last._version] == [0, 0]
    assert not hasattr(first, "label")
    assert all(map(same_bits, (first, last), before))
    assert not first._is_view()


def test_they_are_copied_and_saved_as_any_tensors():
    tables = tk.filter_moments(*pair([(4, 3), (2, 5)], torch.float32))
    saved = io.BytesIO()
    torch.save(tables, saved)
    saved.seek(0)
    for again in (torch.load(saved), copy.deepcopy(tables), [*tables]):
        assert all(map(same_bits, again, tables))
    assert torch.cat(tables).shape == (6, 5)


def test_threads_make_lists_beside_each_other():
    """Of few elements, with Python's lock held, and of many, without it."""
    several = [pair([(7, size)] * 9, torch.float32) for size in (3, 40, 900)]
    expected = [torch.cat(tk.filter_moments(*lists)) for lists in several]

    def run(number: int) -> bool:
        place = number % len(several)
        return same_bits(torch.cat(tk.filter_moments(*several[place])), expected[place])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(600)))


def test_a_plan_splits_what_its_kernels_wrote():
    """As a call on a GPU, which makes its tables in between."""
    if not native.plans_calls:
        pytest.skip("the native module cannot view tensors of this PyTorch")
    weights, grads = pair([(4, 3), (6, 2), (5, 7)], torch.float32)
    plan, on_gpu, _index, wide, filters = native._native.call_filter_moments(
        weights, grads, None, 1, None, True, True, 5, 0, 2**32 - 1, 0, False
    )
    assert (on_gpu, wide, filters) == (False, False, (15, 12))
    tables = [torch.full((count, 5), torch.nan) for count in filters]
    plan.set_tables(*tables, 20)
    native._native.filter_moments_cpu(plan, 1)
    expected = tk.filter_moments(weights, grads, dim=(0, 1))
    for axis in (0, 1):
        assert all(map(same_bits, plan.split(tables[axis], axis), expected[axis]))
