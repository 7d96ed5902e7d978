"""filter_moments(moments=...): what is asked has the bits of a full call, the rest is NaN."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import taylor_kernels as tk
from taylor_kernels.backends import Backend, native, reference, register_backend
from taylor_kernels.ops._direct import leave_out
from tests.helpers.cases import DTYPES, filter_moments_cases, random_like_case, same_bits

CASES = filter_moments_cases()
#: All sets but the empty one.
SETS = [chosen for size in range(1, 6) for chosen in combinations(range(len(tk.MOMENTS)), size)]


def tables(weights, grads, **options) -> list[Tensor]:
    found = tk.filter_moments(weights, grads, **options)
    axes = found if isinstance(found, tuple) else (found,)
    return [table for axis in axes for table in ([axis] if isinstance(axis, Tensor) else axis)]


def check(chosen: tuple[int, ...], got: list[Tensor], full: list[Tensor]) -> None:
    others = [i for i in range(len(tk.MOMENTS)) if i not in chosen]
    assert len(got) == len(full)
    for one, whole in zip(got, full, strict=True):
        assert one.shape == whole.shape
        assert same_bits(one[:, chosen].contiguous(), whole[:, chosen].contiguous())
        assert one[:, others].isnan().all()


def isas() -> list[str]:
    return [] if native._native is None else native._native.cpu_isas()


@pytest.fixture(params=[*isas(), "reference"])
def backend(request: pytest.FixtureRequest):
    """A backend, on every instruction set of this processor."""
    if request.param == "reference":
        yield "reference"
        return
    best = native._native.cpu_isa()
    native._native.set_cpu_isa(request.param)
    yield "cpu"
    native._native.set_cpu_isa(best)


@pytest.mark.sample(60)
@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].name)
def test_bits_are_those_of_a_full_call(at, backend, poisoned_memory):
    """Every case, in turn with every set; those of one sum, which have kernels, with each."""
    case = CASES[at]
    for turn, dim in enumerate(case.dims):
        dtype = (*DTYPES, torch.float64)[(at + turn) % (len(DTYPES) + 1)]
        pair = random_like_case(case, dtype, count=2)
        options = dict(dim=dim, groups=case.groups, backend=backend)
        full = tables(*pair, **options)
        for chosen in (*SETS[:5], SETS[5 + (3 * at + turn) % (len(SETS) - 5)]):
            names = tuple(tk.MOMENTS[i] for i in chosen)
            check(chosen, tables(*pair, moments=names, **options), full)


@pytest.mark.parametrize("chosen", SETS[:6])
@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_a_list_has_them_by_every_way(chosen, dim, monkeypatch):
    """Large enough for several tasks, and by the dispatcher."""
    shapes = [(300, 3000), (7, 5, 3, 3), (1, 200_000), (5000, 2), (64, 64)]
    weights, grads = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    names = [tk.MOMENTS[i] for i in chosen]
    full = tables(weights, grads, dim=dim)
    check(chosen, tables(weights, grads, dim=dim, moments=names), full)
    monkeypatch.setattr(native, "plans_calls", False)
    check(chosen, tables(weights, grads, dim=dim, moments=names), full)


@pytest.mark.parametrize(("chosen", "fills"), [(0b00001, 1), (0b00010, 2), (0b10000, 1)])
def test_unwanted_columns_side_by_side_take_one_fill(chosen, fills):
    """Each is a launch on a GPU."""
    table = torch.zeros(3, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        leave_out([table], chosen)
    assert sum(event.name == "aten::fill_" for event in profile.events()) == fills
    assert [not column.isnan().any() for column in table.T] == [
        bool(chosen >> i & 1) for i in range(5)
    ]
    assert table.isnan().sum() == 3 * 4


def test_traced_and_under_vmap():
    w, g = torch.randn(2, 3, 4, 6)
    run = lambda w, g: tk.filter_moments(w, g, moments=("gw2",))  # noqa: E731
    traced = make_fx(run)(w[0], g[0])
    for one in (traced(w[0], g[0]), torch.vmap(run)(w, g)[0]):
        check((1,), [one], tables(w[0], g[0]))
    torch.library.opcheck(
        torch.ops.taylor_kernels.filter_moments.default,
        ([w[0]], [g[0]], [1], True, True, None, 2),
        test_utils=("test_schema", "test_faketensor"),
    )
    with pytest.raises(ValueError, match="sums: 32 has no such bits; pass 1 to 31"):
        torch.ops.taylor_kernels.filter_moments([w[0]], [g[0]], [1], True, False, None, 32)


def test_a_backend_of_another_package_need_not_know_of_it(monkeypatch):
    """Its kernels take items alone."""
    monkeypatch.setattr("taylor_kernels.backends._backends", {})
    kernels = type("Kernels", (), {"filter_moments": staticmethod(reference.filter_moments)})
    register_backend(
        Backend("theirs", ("cpu",), lambda: (True, "1"), lambda: kernels, float64=True)
    )
    w, g = torch.randn(2, 4, 6)
    check((0, 3), tables(w, g, moments=("gw", "w2")), tables(w, g))


@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        ("gw2", TypeError, r"moments: expected a sequence of names, such as \('gw2',\), got 'gw2'"),
        (3, TypeError, "moments: expected a sequence of names"),
        (("gw2", "g"), ValueError, "moments: 'g' is not one of gw, gw2, abs_gw, w2, g2"),
        ([1], ValueError, "moments: 1 is not one of"),
        ((), ValueError, "moments: names none; pass at least one"),
    ],
)
def test_bad_moments_are_one_clear_error(moments, error, message):
    w = torch.randn(3, 4)
    with pytest.raises(error, match=message):
        tk.filter_moments(w, w, moments=moments)
    with pytest.raises(error, match=message):
        tk.Criterion("any", "moments", lambda table: table[:, 0], moments=moments)
