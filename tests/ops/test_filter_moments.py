"""filter_moments on the CPU: every backend against float64, and the promises on its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taylor_kernels as tk
from tests.helpers import cases
from tests.helpers.parameter_ops import assert_bits_do_not_depend_on_the_list, model_like_lists

BACKENDS = ("cpu", "reference")


def as_tuple(tables: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tables if isinstance(tables, tuple) else (tables,)


def check(weight: Tensor, grad: Tensor, dim, groups: int, backend: str | None) -> None:
    tables = as_tuple(tk.filter_moments(weight, grad, dim=dim, groups=groups, backend=backend))
    axes = dim if isinstance(dim, tuple) else (dim,)
    for axis, table in zip(axes, tables, strict=True):
        cases.assert_close(table, *cases.reference64(weight, grad, axis, groups))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.filter_moments_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, case, dtype, poisoned_memory):
    weight, grad = cases.random_like_case(case, dtype)
    for dim in case.dims:
        check(weight, grad, dim, case.groups, backend)


@pytest.mark.parametrize("case", cases.filter_moments_cases(), ids=lambda case: case.name)
def test_every_instruction_set_matches_float64(case, each_isa, poisoned_memory):
    for dtype in cases.DTYPES:
        weight, grad = cases.random_like_case(case, dtype)
        for dim in case.dims:
            check(weight, grad, dim, case.groups, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.filter_moments_cases(), ids=lambda case: case.name)
def test_float64_is_summed_in_float64(case, backend, poisoned_memory):
    weight, grad = cases.random_like_case(case, torch.float64)
    for dim in case.dims:
        tables = as_tuple(
            tk.filter_moments(weight, grad, dim=dim, groups=case.groups, backend=backend)
        )
        for axis, table in zip(dim if isinstance(dim, tuple) else (dim,), tables, strict=True):
            ref, bound = cases.reference64(weight, grad, axis, case.groups)
            assert table.dtype == torch.float64
            # Two float64 sums of the same terms in different orders.
            scale = bound.clamp_min(torch.finfo(torch.float64).tiny)
            torch.testing.assert_close(table / scale, ref / scale, rtol=0, atol=1e-13)


@given(
    rows=st.integers(1, 70),
    channels=st.integers(1, 40),
    kernel=st.sampled_from([(), (1,), (3,), (3, 3), (2, 3), (1, 1), (2, 2, 2)]),
    groups=st.integers(1, 6),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_matches_float64(rows, channels, kernel, groups, channels_last, seed):
    shape = (rows * groups, channels, *kernel)
    case = cases.MomentsCase(
        "any", shape, groups, "channels_last" if channels_last else "contiguous"
    )
    weight, grad = cases.random_like_case(case, torch.float32, seed=seed)
    check(weight, grad, (0, 1), groups, None)


def test_error_is_at_most_twice_that_of_eager_sums():
    weight, grad = torch.randn(2, 257, 2304)
    ref, bound = cases.reference64(weight, grad, 0)
    gw = weight * grad
    terms = torch.stack((gw, gw * gw, gw.abs(), weight * weight, grad * grad), -1)
    eager = ((terms.sum(1) - ref).abs() / bound).amax(0)
    ours = ((tk.filter_moments(weight, grad, backend="cpu") - ref).abs() / bound).amax(0)
    assert (ours <= 2 * eager).all(), (ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_bits_do_not_depend_on_the_list(backend, dim, poisoned_memory):
    (weights, grads), groups = model_like_lists(2)

    def run(order):
        return tk.filter_moments(
            [weights[i] for i in order],
            [grads[i] for i in order],
            dim=dim,
            groups=[groups[i] for i in order],
            backend=backend,
        )

    assert_bits_do_not_depend_on_the_list(run, [tuple(w.shape) for w in weights])


@pytest.mark.parametrize("dim", [0, 1])
def test_bits_do_not_depend_on_threads(dim, keep_threads):
    (weights, grads), groups = model_like_lists(2)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        one = tk.filter_moments(weights, grads, dim=dim, groups=groups, backend="cpu")
        both = tk.filter_moments(weights, grads, dim=(0, 1), groups=groups, backend="cpu")
        runs.append(torch.cat([*one, *both[0], *both[1]]))
    assert runs[0].equal(runs[1])
    assert runs[0].equal(runs[2])


def test_a_list_comes_back_as_views_of_one_table():
    (weights, grads), _ = model_like_lists(2)
    tables = tk.filter_moments(weights, grads)
    assert [len(t) for t in tables] == [w.size(0) for w in weights]
    assert len({t.untyped_storage().data_ptr() for t in tables}) == 1
    assert tk.filter_moments([], []) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_their_filters_and_no_others(backend, value):
    weight, grad = torch.randn(2, 40, 21, 3, 3)
    weight[7, 5, 1, 2] = value
    rows, cols = tk.filter_moments(weight, grad, dim=(0, 1), backend=backend)
    for table, bad, axis in ((rows, 7, 0), (cols, 5, 1)):
        cases.assert_close(table, *cases.reference64(weight, grad, axis))
        assert not table[bad, 0].isfinite()
        assert table[torch.arange(len(table)) != bad].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_products_do_not_underflow(backend):
    weight = torch.full((3, 100), 1e-3, dtype=torch.float16)
    grad = torch.full((3, 100), 1e-4, dtype=torch.float16)
    table = tk.filter_moments(weight, grad, backend=backend)
    expected = 100 * (weight[0, 0].double() * grad[0, 0].double()) ** 2
    assert (weight * grad).square().sum() == 0  # what half arithmetic makes of it
    torch.testing.assert_close(table[:, 1].double(), expected.expand(3), rtol=1e-5, atol=0)


def test_a_gradient_in_another_layout_is_paired_element_by_element():
    weight, grad = torch.randn(2, 8, 6, 3, 3)
    for w, g in (
        (weight.to(memory_format=torch.channels_last), grad),
        (weight, grad.to(memory_format=torch.channels_last)),
        (weight.transpose(2, 3).contiguous().transpose(2, 3), grad),
    ):
        for got, axis in zip(tk.filter_moments(w, g, dim=(0, 1)), (0, 1), strict=True):
            cases.assert_close(got, *cases.reference64(weight, grad, axis))


def test_scores_are_not_differentiable():
    weight = torch.randn(4, 5, requires_grad=True)
    assert not tk.filter_moments(weight, torch.randn(4, 5)).requires_grad


def test_the_op_passes_torch_opcheck():
    weights, grads = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(
        torch.ops.taylor_kernels.filter_moments.default,
        (list(weights), list(grads), [1, 1, 1], True, True, None),
    )


def test_the_op_runs_inside_torch_compile():
    def total(weight, grad):
        return tk.filter_moments(weight, grad)[:, 1].sum() * 2

    weight, grad = torch.randn(2, 6, 7)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    assert compiled(weight, grad).equal(total(weight, grad))


W = torch.randn(4, 6, 3, 3)
BAD_INPUTS = {
    "shape": (dict(weights=W, grads=W[:3]), ValueError, r"grads: shape \(3, 6, 3, 3\).*weights"),
    "dtype": (dict(weights=W, grads=W.half()), ValueError, "grads: dtype"),
    "device": (dict(weights=W, grads=W.to("meta")), TypeError, "grads: a meta tensor"),
    "meta": (dict(weights=W.to("meta"), grads=W), TypeError, "weights: a meta tensor"),
    "integer": (dict(weights=W.int(), grads=W.int()), TypeError, "weights: dtype torch.int32"),
    "complex": (dict(weights=W.cfloat(), grads=W.cfloat()), TypeError, "dtype torch.complex64"),
    "sparse": (dict(weights=W.to_sparse(), grads=W), TypeError, "layout torch.sparse_coo"),
    "none": (dict(weights=[W, W], grads=[W, None]), TypeError, r"grads\[1\].*NoneType.*backward"),
    "length": (dict(weights=[W, W], grads=[W]), ValueError, "grads: 1 gradients for 2 weights"),
    "mixed": (dict(weights=[W], grads=W), TypeError, "grads: got one tensor for a sequence"),
    "dim": (dict(weights=W, grads=W, dim=2), ValueError, "dim: 2 is not one of"),
    "dims": (dict(weights=W, grads=W, dim=(1, 0)), ValueError, r"dim: \(1, 0\)"),
    "vector": (dict(weights=W[0, 0, 0], grads=W[0, 0, 0], dim=1), ValueError, "no dim 1"),
    "scalar": (dict(weights=W.sum(), grads=W.sum()), ValueError, "has 0 dimensions"),
    "groups": (dict(weights=W, grads=W, dim=1, groups=3), ValueError, "groups: 3 does not divide"),
    "no_groups": (dict(weights=W, grads=W, groups=0), ValueError, "groups: 0 is not a positive"),
    "nothing": (dict(weights=None, grads=None), TypeError, "weights: expected a tensor or a seq"),
    "no_grads": (dict(weights=[W], grads=None), TypeError, "grads: expected a tensor or a seq"),
    "no_dim": (dict(weights=W, grads=W, dim=None), ValueError, "dim: None is not one of"),
    "odd_groups": (dict(weights=W, grads=W, groups=None), TypeError, "groups: expected an int"),
    "odd_backend": (dict(weights=W, grads=W, backend=3), TypeError, "backend: 3 is not one of"),
    "backend": (dict(weights=W, grads=W, backend="cudnn"), ValueError, "backend: 'cudnn'.*cuda"),
    "gpu_backend": (dict(weights=W, grads=W, backend="cuda"), ValueError, "does not run on cpu"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.filter_moments(**arguments)
