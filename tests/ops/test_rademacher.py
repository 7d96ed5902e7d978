"""rademacher_like on the CPU: the signs of every backend against an implementation of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_kernels as tk
from taylor_kernels.backends import reference
from tests.helpers import cases, probes

BACKENDS = ("cpu", "reference")
DTYPES = (*cases.DTYPES, torch.float64)


@pytest.mark.parametrize("known", probes.KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(known):
    counter, key, answer = known
    words = np.array([counter, counter], dtype=np.uint64)
    assert probes.philox(words, key).tolist() == [list(answer)] * 2
    found = reference.philox4x32(torch.tensor(words.astype(np.int64)).T, key[0] | key[1] << 32)
    assert found.tolist() == [list(answer)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_signs_are_the_published_bits(backend):
    """Seed 0, stream 0, elements 0 to 127: the first of the known answers."""
    answer = probes.KNOWN_ANSWERS[0][2]
    signs = tk.rademacher_like(torch.empty(128), seed=0, backend=backend)
    expected = [-1.0 if answer[e // 32] >> e % 32 & 1 else 1.0 for e in range(128)]
    assert signs.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layout_gets_the_signs_of_its_order(backend, dtype, poisoned_memory):
    each = [
        cases.random_like_case(case, dtype, count=1)[0] for case in cases.filter_moments_cases()
    ]
    for seed in probes.SEEDS:
        found = tk.rademacher_like(each, seed=seed, backend=backend)
        for stream, (tensor, signs) in enumerate(zip(each, found, strict=True)):
            assert (signs.dtype, signs.shape) == (dtype, tensor.shape)
            assert signs.double().equal(probes.signs(tensor, seed, stream)), tensor.shape


@pytest.mark.parametrize("count", [1, 127, 128, 129, 2047, 2049, 65537, 200_001])
def test_every_instruction_set_draws_the_same(count, each_isa, poisoned_memory):
    for dtype in DTYPES:
        signs = tk.rademacher_like(torch.empty(count, dtype=dtype), seed=-5, backend="cpu")
        expected = 1.0 - 2.0 * torch.from_numpy(probes.bits(-5, 0, 0, count)).double()
        assert signs.double().equal(expected)


@given(
    shape=st.lists(st.integers(1, 9), max_size=5),
    seed=st.integers(-(2**63), 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100)
def test_any_seed_and_stream(shape, seed, stream):
    tensor = torch.empty(shape)
    expected = probes.signs(tensor, seed, stream)
    for backend in BACKENDS:
        found = tk.rademacher_like(tensor, seed=seed, streams=[stream], backend=backend)
        assert found.double().equal(expected)


def test_signs_do_not_depend_on_threads_or_the_list(keep_threads):
    each = [torch.empty(n) for n in (300_000, 5, 70_000, 200)]
    whole = tk.rademacher_like(each, seed=3)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        backwards = tk.rademacher_like(each[::-1], seed=3, streams=[3, 2, 1, 0])[::-1]
        alone = [tk.rademacher_like(t, seed=3, streams=[i]) for i, t in enumerate(each)]
        for a, b, c in zip(whole, backwards, alone, strict=True):
            assert a.equal(b)
            assert a.equal(c)


def test_strides_are_kept_where_kernels_read_in_place():
    weight = torch.empty(4, 6, 3, 3)
    last = weight.to(memory_format=torch.channels_last)
    odd = weight.transpose(0, 1)
    found = tk.rademacher_like([weight, last, odd], seed=1)
    strides = [t.stride() for t in (weight, last, odd.contiguous())]
    assert [t.stride() for t in found] == strides
    assert not any(t.requires_grad for t in found)


def test_signs_are_balanced_and_unrelated():
    """Means and products over 2**20 signs: within six standard deviations of 0."""
    n = 2**20
    one, two = tk.rademacher_like([torch.empty(n)] * 2, seed=0)
    other = tk.rademacher_like(torch.empty(n), seed=1)
    for product in (one, one * two, one * other, one[:-1] * one[1:], one[:-128] * one[128:]):
        assert abs(product.sum().item()) < 6 * n**0.5


def test_the_op_passes_torch_opcheck():
    op = torch.ops.taylor_kernels.rademacher.default
    torch.library.opcheck(op, (torch.randn(3, 4), [64, 0, 128], 7, [0, 9, 5], None))


def test_vmap_draws_the_signs_of_one_slice_for_each():
    tensors = torch.randn(3, 4, 5, requires_grad=True)
    got = torch.vmap(lambda tensor: tk.rademacher_like(tensor, seed=2))(tensors)
    assert got.equal(tk.rademacher_like(tensors[0], seed=2).expand(3, 4, 5))
    assert not got.requires_grad


def test_the_op_runs_inside_torch_compile():
    def doubled(tensor):
        return tk.rademacher_like(tensor, seed=3) * 2

    tensor = torch.randn(6, 7)
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    assert compiled(tensor).equal(doubled(tensor))


T = torch.randn(4, 6)
BAD_INPUTS = {
    "nothing": (dict(tensors=None), TypeError, "tensors: expected a tensor or a sequence"),
    "none": (dict(tensors=[T, None]), TypeError, r"tensors\[1\]: expected a torch.Tensor"),
    "integer": (dict(tensors=T.int()), TypeError, "tensors: dtype torch.int32 is not supported"),
    "meta": (dict(tensors=T.to("meta")), TypeError, "tensors: a meta tensor"),
    "no_seed": (dict(seed=None), TypeError, "seed: expected an int, got NoneType"),
    "large_seed": (dict(seed=2**64), ValueError, "seed: 18446744073709551616 does not fit"),
    "small_seed": (dict(seed=-(2**63) - 1), ValueError, "seed: -9223372036854775809 does not"),
    "streams": (dict(streams=[1, 2]), ValueError, "streams: 2 values for 1 tensors"),
    "stream": (dict(streams=[2**32]), ValueError, "streams: 4294967296 is not an integer from 0"),
    "an_int": (dict(streams=4), TypeError, "streams: expected one int for each tensor"),
    "backend": (dict(backend="cuda"), ValueError, "does not run on cpu"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.rademacher_like(**{**dict(tensors=T, seed=0), **arguments})
