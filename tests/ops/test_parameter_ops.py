"""The ops over lists of parameters on the CPU: against float64, and what all of them promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import cases
from tests.helpers.cases import same_bits
from tests.helpers.parameter_ops import (
    EVERY_OP,
    ParameterOp,
    assert_bits_do_not_depend_on_the_list,
    axes_of,
    model_like_lists,
)

BACKENDS = ("cpu", "reference")
CASES = cases.filter_moments_cases()
STREAMS = (0, 2**32 - 1, 1)  # for dim 0, 1 and both


@pytest.fixture(params=EVERY_OP, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> ParameterOp:
    return request.param


@pytest.mark.sample(180)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(op, backend, case, dtype, poisoned_memory):
    tensors = cases.random_like_case(case, dtype, count=op.lists)
    for stream, dim in zip(STREAMS, case.dims, strict=False):
        op.check(tensors, dim, case.groups, backend, stream)


@pytest.mark.sample(135)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_instruction_set_matches_float64(op, case, each_isa, poisoned_memory):
    for dtype in cases.DTYPES:
        tensors = cases.random_like_case(case, dtype, count=op.lists)
        for stream, dim in zip(STREAMS, case.dims, strict=False):
            op.check(tensors, dim, case.groups, "cpu", stream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_is_summed_in_float64(op, case, backend, poisoned_memory):
    op.check_float64(case, backend)


@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.name)
@given(
    rows=st.integers(1, 70),
    channels=st.integers(1, 40),
    kernel=st.sampled_from([(), (1,), (3,), (3, 3), (2, 3), (1, 1), (2, 2, 2)]),
    groups=st.integers(1, 6),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100)
def test_any_shape_matches_float64(op, rows, channels, kernel, groups, channels_last, seed):
    layout = "channels_last" if channels_last else "contiguous"
    case = cases.MomentsCase("any", (rows * groups, channels, *kernel), groups, layout)
    tensors = cases.random_like_case(case, torch.float32, seed=seed, count=op.lists)
    op.check(tensors, (0, 1), groups, None, seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_bits_do_not_depend_on_the_list(op, backend, dim, poisoned_memory):
    lists, groups = model_like_lists(op.lists)

    def run(order):
        picked = [[tensors[i] for i in order] for tensors in lists]
        some = [groups[i] for i in order]
        return op.call(picked, list(order), dim=dim, groups=some, backend=backend)

    assert_bits_do_not_depend_on_the_list(run, [tuple(w.shape) for w in lists[0]])


@pytest.mark.parametrize("dim", [0, 1])
def test_bits_do_not_depend_on_threads(op, dim, keep_threads):
    lists, groups = model_like_lists(op.lists)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        one, both = (
            op.call(lists, None, dim=dims, groups=groups, backend="cpu") for dims in (dim, (0, 1))
        )
        runs.append(torch.cat([*one, *both[0], *both[1]]))
    assert runs[0].equal(runs[1])
    assert runs[0].equal(runs[2])


def test_lists_may_mix_dtypes_and_come_back_as_views_of_one_table(op):
    lists, _ = model_like_lists(op.lists)
    tables = op.call(lists, None)
    assert [len(t) for t in tables] == [w.size(0) for w in lists[0]]
    assert len({t.untyped_storage().data_ptr() for t in tables}) == 1
    mixed = [[t, t.double()] for t in torch.randn(op.lists, 5, 7)]
    single, double = op.call(mixed, [4, 4])
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    assert op.call([[]] * op.lists, None) == []


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_a_packed_table_has_the_tables_of_a_list_one_after_another(op, dim, backend):
    lists, groups = model_like_lists(op.lists)
    lists = [[*tensors, tensors[-1][:0], tensors[0].transpose(0, 1)] for tensors in lists]
    groups = [*groups, 1, 1]
    listed, packed = (
        op.call(lists, None, dim=dim, groups=groups, backend=backend, packed=packed)
        for packed in (False, True)
    )
    pairs = zip(listed, packed, strict=True) if dim == (0, 1) else [(listed, packed)]
    for tables, table in pairs:
        assert same_bits(torch.cat(tables), table)
    one = [tensors[0] for tensors in lists]
    whole, alone = (op.call(one, None, groups=1, packed=packed) for packed in (True, False))
    assert same_bits(whole, alone)
    assert op.call([[]] * op.lists, None, packed=True).shape == (0, *whole.shape[1:])


def test_a_packed_table_is_of_one_kind(op):
    mixed = [[t, t.double()] for t in torch.randn(op.lists, 5, 7)]
    with pytest.raises(ValueError, match="packed: one table takes"):
        op.call(mixed, None, packed=True)
    with pytest.raises(TypeError, match="packed: expected True or False, got 1"):
        op.call(mixed, None, packed=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_their_filters_and_no_others(op, backend, value):
    for which in range(op.lists):
        tensors = list(torch.randn(op.lists, 40, 21, 3, 3))
        tensors[which][7, 5, 1, 2] = value
        tables = op.run(tensors, (0, 1), 1, backend)
        for table, bad, axis in zip(tables, (7, 5), (0, 1), strict=True):
            cases.assert_close(table, *op.reference64(tensors, axis))
            assert not table[bad, 0].isfinite()
            assert table[torch.arange(len(table)) != bad].isfinite().all()


def test_other_layouts_are_paired_element_by_element(op):
    """Also random signs, which follow the weight's order in memory."""
    tensors = torch.randn(op.lists, 8, 6, 3, 3)
    layouts = [
        tensors,
        [t.to(memory_format=torch.channels_last) for t in tensors],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors],
    ]
    for one in range(op.lists):
        for here in layouts:
            for there in layouts:
                picked = [(here if i == one else there)[i] for i in range(op.lists)]
                op.check(picked, (0, 1))


def test_scores_are_not_differentiable(op):
    weights, others = [torch.randn(4, 5, requires_grad=True)], [[torch.randn(4, 5)]] * 2
    lists = [weights, *others][: op.lists]
    assert not op.call(lists, None)[0].requires_grad
    for backend in BACKENDS:
        direct, arguments = op.direct(lists, backend)
        rows, cols = direct(*arguments)
        assert (rows.requires_grad, cols.requires_grad) == (False, False)
        assert rows.view(4, op.sums).equal(op.run([each[0] for each in lists], 0, 1, backend)[0])


def test_the_op_passes_torch_opcheck(op):
    lists = [list(tensors) for tensors in torch.randn(op.lists, 3, 4, 5)]
    torch.library.opcheck(*op.direct(lists))
    lists[0] = [weight.requires_grad_() for weight in lists[0]]
    torch.library.opcheck(*op.direct(lists))


def test_the_op_runs_inside_torch_compile(op):
    def total(*tensors):
        return op.call(tensors, None).sum() * 2

    tensors = torch.randn(op.lists, 6, 7)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    assert compiled(*tensors).equal(total(*tensors))


@pytest.mark.parametrize("dim", [0, (0, 1)])
def test_vmap_gives_the_bits_of_each_slice(op, dim):
    tensors = torch.randn(op.lists, 9, 3, 7)  # slices of the middle dimension

    def tables(*slices):
        return op.call([[t] for t in slices], [5], dim=dim)

    each = torch.vmap(tables, in_dims=1)(*tensors)
    alone = [tables(*tensors[:, :, i]) for i in range(3)]
    if dim == 0:
        each, alone = (each,), [(one,) for one in alone]
    for axis in range(len(axes_of(dim))):
        assert each[axis][0].equal(torch.stack([one[axis][0] for one in alone]))


def test_torch_compile_keeps_the_op_out_of_cuda_graphs_where_triton_is_the_default(op):
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this PyTorch has no such tag")
    native = pytest.importorskip("taylor_kernels._native")
    assert (tag in op.direct([[]])[0].tags) == (not native.cuda_version)
