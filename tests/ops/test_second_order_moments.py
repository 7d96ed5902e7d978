"""second_order_moments on the CPU: every backend against float64, and the promises on its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.second_order_moments import second_order_sums
from tests.helpers import cases
from tests.helpers.parameter_ops import (
    SECOND_ORDER,
    assert_bits_do_not_depend_on_the_list,
    model_like_lists,
)

BACKENDS = ("cpu", "reference")
CASES = cases.filter_moments_cases()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_match_float64(backend, case, dtype, poisoned_memory):
    tensors = cases.random_like_case(case, dtype, count=3)
    for dim in case.dims:
        SECOND_ORDER.check(tensors, dim, case.groups, backend)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_instruction_set_matches_float64(case, each_isa, poisoned_memory):
    for dtype in cases.DTYPES:
        tensors = cases.random_like_case(case, dtype, count=3)
        SECOND_ORDER.check(tensors, case.dims[-1], case.groups, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_is_summed_in_float64(case, backend, poisoned_memory):
    SECOND_ORDER.check_float64(case, backend)


@given(
    rows=st.integers(1, 70),
    channels=st.integers(1, 40),
    kernel=st.sampled_from([(), (1,), (3,), (3, 3), (2, 2, 2)]),
    groups=st.integers(1, 6),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=75, deadline=None)
def test_any_shape_matches_float64(rows, channels, kernel, groups, channels_last, seed):
    layout = "channels_last" if channels_last else "contiguous"
    case = cases.MomentsCase("any", (rows * groups, channels, *kernel), groups, layout)
    tensors = cases.random_like_case(case, torch.float32, seed=seed, count=3)
    SECOND_ORDER.check(tensors, (0, 1), groups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_column_is_squared_and_nothing_else_changes(backend):
    lists, groups = model_like_lists(3)
    arguments = dict(dim=(0, 1), groups=groups, backend=backend)
    moments = tk.second_order_moments(*lists, **arguments)
    sums = second_order_sums(*lists, **arguments)
    for squared, signed in zip(moments, sums, strict=True):
        assert any((table[:, 0] < 0).any() for table in signed)
        for a, b in zip(squared, signed, strict=True):
            assert a[:, 0].equal(b[:, 0].square())
            assert a[:, 1].equal(b[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_loss_change_of_a_quadratic(backend):
    """L(w) = ½ (w−a)ᵀA(w−a): all filters but f at zero, q of f is exact."""
    size, filters = 30, 6
    root = torch.randn(size, size, dtype=torch.float64)
    matrix, centre = root @ root.T / size, torch.randn(size, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return (w - centre) @ matrix @ (w - centre) / 2

    full = torch.randn(filters, size // filters, dtype=torch.float64)
    for f in range(filters):
        weight = torch.zeros_like(full)
        weight[f] = full[f]
        flat = weight.flatten()
        grad = (matrix @ (flat - centre)).view_as(weight)
        hvp = (matrix @ flat).view_as(weight)
        table = tk.second_order_moments(weight, grad, hvp, backend=backend)
        change = loss(flat) - loss(torch.zeros_like(flat))
        torch.testing.assert_close(table[f, 0], change**2)
        assert not table[torch.arange(filters) != f].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_bits_do_not_depend_on_the_list(backend, dim, poisoned_memory):
    lists, groups = model_like_lists(3)

    def run(order):
        picked = ([tensors[i] for i in order] for tensors in lists)
        some = [groups[i] for i in order]
        return tk.second_order_moments(*picked, dim=dim, groups=some, backend=backend)

    assert_bits_do_not_depend_on_the_list(run, [tuple(w.shape) for w in lists[0]])


@pytest.mark.parametrize("dim", [0, 1])
def test_bits_do_not_depend_on_threads(dim, keep_threads):
    lists, groups = model_like_lists(3)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        one = tk.second_order_moments(*lists, dim=dim, groups=groups, backend="cpu")
        both = tk.second_order_moments(*lists, dim=(0, 1), groups=groups, backend="cpu")
        runs.append(torch.cat([*one, *both[0], *both[1]]))
    assert runs[0].equal(runs[1])
    assert runs[0].equal(runs[2])


def test_lists_may_mix_dtypes_and_come_back_as_views_of_one_table():
    lists, _ = model_like_lists(3)
    tables = tk.second_order_moments(*lists)
    assert len({t.untyped_storage().data_ptr() for t in tables}) == 1
    mixed = [[t, t.double()] for t in torch.randn(3, 5, 7)]
    single, double = tk.second_order_moments(*mixed)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    assert tk.second_order_moments([], [], []) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_their_filters_and_no_others(backend, value):
    for which in range(3):
        tensors = torch.randn(3, 40, 21, 3, 3)
        tensors[which, 7, 5, 1, 2] = value
        rows, cols = SECOND_ORDER.run(list(tensors), (0, 1), 1, backend)
        for table, bad in ((rows, 7), (cols, 5)):
            assert not table[bad].isfinite().any()
            assert table[torch.arange(len(table)) != bad].isfinite().all()


def test_other_layouts_are_paired_element_by_element():
    tensors = torch.randn(3, 8, 6, 3, 3)
    last = [t.to(memory_format=torch.channels_last) for t in tensors]
    for w, g, h in ((0, 1, 2), (0, 4, 2), (3, 1, 2), (0, 1, 5), (3, 4, 2)):
        every = [*tensors, *last]
        picked = [every[w], every[g], every[h]]
        for axis, got in enumerate(SECOND_ORDER.run(picked, (0, 1))):
            cases.assert_close(got, *SECOND_ORDER.reference64(list(tensors), axis))


def test_scores_are_not_differentiable():
    weight = torch.randn(4, 5, requires_grad=True)
    assert not tk.second_order_moments(weight, *torch.randn(2, 4, 5)).requires_grad


def test_the_op_passes_torch_opcheck():
    lists = [list(tensors) for tensors in torch.randn(3, 3, 4, 5)]
    op = torch.ops.taylor_kernels.second_order_moments.default
    torch.library.opcheck(op, (*lists, [1, 1, 1], True, True, None))


def test_the_op_runs_inside_torch_compile():
    def total(*tensors):
        return tk.second_order_moments(*tensors).sum() * 2

    tensors = torch.randn(3, 6, 7)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    assert compiled(*tensors).equal(total(*tensors))


W = torch.randn(4, 6, 3, 3)
BAD_INPUTS = {
    "shape": (dict(hvps=W[:3]), ValueError, r"hvps: shape \(3, 6, 3, 3\).*weights"),
    "grad_shape": (dict(grads=W[:3]), ValueError, r"grads: shape \(3, 6, 3, 3\).*weights"),
    "dtype": (dict(hvps=W.half()), ValueError, "hvps: dtype torch.float16 does not match"),
    "device": (dict(hvps=W.to("meta")), TypeError, "hvps: a meta tensor"),
    "none": (dict(hvps=None), TypeError, "hvps: expected a torch.Tensor like weights"),
    "a_list": (dict(hvps=[W]), TypeError, "hvps: expected a torch.Tensor like weights, got list"),
    "none_in_list": (
        dict(weights=[W], grads=[W], hvps=[None]),
        TypeError,
        r"hvps\[0\].*NoneType",
    ),
    "length": (
        dict(weights=[W, W], grads=[W, W], hvps=[W]),
        ValueError,
        "hvps: 1 Hessian-vector products for 2 weights",
    ),
    "mixed": (dict(weights=[W], grads=[W]), TypeError, "hvps: got one tensor for a sequence"),
    "dim": (dict(dim=2), ValueError, "dim: 2 is not one of"),
    "groups": (dict(dim=1, groups=3), ValueError, "groups: 3 does not divide"),
    "backend": (dict(backend="cuda"), ValueError, "does not run on cpu"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.second_order_moments(**{**dict(weights=W, grads=W, hvps=W), **arguments})
