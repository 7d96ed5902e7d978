"""Calls that go past PyTorch's dispatcher: which do, and that they give what the others give."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import taylor_kernels as tk
from taylor_kernels.backends import native
from tests.helpers.cases import lay_out, same_bits

if not native.plans_calls:
    pytest.skip("the native module cannot view tensors of this PyTorch", allow_module_level=True)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that the native module ran on tensors as they are."""
    ops: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            function = getattr(real, name)
            if not name.startswith("call_"):
                return function

            def run(*args: Any) -> Any:
                result = function(*args)
                if result is not None:
                    ops.append(name.removeprefix("call_"))
                return result

            return run

    real = native._native
    monkeypatch.setattr(native, "_native", Watched())
    return ops


def through_the_dispatcher(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(native, "plans_calls", False)
        return call()


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for each in result for tensor in leaves(each)]


SHAPES = [(7,), (5, 3), (6, 4, 3), (8, 4, 3, 2), (4, 2, 3, 2, 2), (1,), (1, 1, 1, 1), (6, 1, 3, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_lists_have_the_bits_of_the_dispatcher(dtype, layout, planned, monkeypatch):
    for dim in (0, 1, (0, 1)):
        shapes = [shape for shape in SHAPES if len(shape) > 1 or dim == 0]
        groups = [1 + (shape[0] % 2 == 0) for shape in shapes]

        def random(shapes=shapes) -> list[Tensor]:
            return [
                lay_out(torch.randn(shape).to(dtype), layout if len(shape) > 1 else "contiguous")
                for shape in shapes
            ]

        w, g, h = random(), random(), random()
        calls = {
            "filter_moments": lambda: tk.filter_moments(w, g, dim=dim, groups=groups),  # noqa: B023
            "second_order_moments": lambda: tk.second_order_moments(w, g, h, dim=dim),  # noqa: B023
            "hutchinson_moments": lambda: tk.hutchinson_moments(w, h, seed=-3, dim=dim),  # noqa: B023
        }
        for op, call in calls.items():
            planned.clear()
            got = leaves(call())
            assert planned == [op]
            ref = leaves(through_the_dispatcher(monkeypatch, call))
            assert all(map(same_bits, got, ref))
            assert len(got) == len(ref)
            assert [table.shape for table in got] == [table.shape for table in ref]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activations_have_the_bits_of_the_dispatcher(dtype, layout, planned, monkeypatch):
    def random(*shape: int) -> Tensor:
        return lay_out(torch.randn(shape).to(dtype), layout)

    y, bias, x = random(3, 6, 5, 4), torch.randn(6).to(dtype), random(3, 4, 7, 6)
    weight = torch.randn(6, 2, 3, 2).to(dtype)
    flat = [torch.randn(3, 5, size).to(dtype) for size in (4, 6)]
    calls: list[tuple[str, Callable[[], Tensor]]] = [
        ("gate_gradients", lambda: tk.gate_gradients(y, y, bias=bias)),
        ("gate_gradients", lambda: tk.gate_gradients(y, y, channel_dim=1)),
        ("conv2d_fisher", lambda: tk.conv2d_fisher(x, (6, 2, 3, 3), y, groups=2, padding=(0, 0))),
        ("linear_fisher", lambda: tk.linear_fisher(*flat)),
        ("linear_fisher", lambda: tk.linear_fisher(*flat, weight=weight[:, :2, :2, 0].flatten(1))),
        ("linear_fisher", lambda: tk.linear_fisher(flat[0][:, 0].clone(), flat[1][:, 0].clone())),
    ]
    for op, call in calls:
        planned.clear()
        got = call()
        assert planned == [op]
        assert same_bits(got, through_the_dispatcher(monkeypatch, call))


W, G = torch.randn(4, 3), torch.randn(4, 3)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class _SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Sub(Tensor):
    pass


def test_what_wants_to_see_the_op_sees_it(planned):
    with _Seen() as seen:
        tk.filter_moments(W, G)
        tk.gate_gradients(W, G)
    assert {"taylor_kernels.filter_moments.default", "taylor_kernels.gate_gradients.default"} <= {
        *seen.ops
    }
    assert (
        "taylor_kernels.filter_moments" in make_fx(lambda w, g: tk.filter_moments(w, g))(W, G).code
    )
    with torch.profiler.profile() as profile:
        tk.filter_moments(W, G)
    assert "taylor_kernels::filter_moments" in {event.key for event in profile.key_averages()}
    assert "taylor_kernels::filter_moments" in str(
        torch.jit.trace(lambda w, g: tk.filter_moments(w, g), (W, G), check_trace=False).graph
    )
    with _SeenFunctions():
        tk.filter_moments(W, G)
    torch.vmap(lambda w, g: tk.filter_moments(w, g))(W[None], G[None])
    tk.filter_moments(W.as_subclass(_Sub), G)
    assert planned == []
    tk.filter_moments(W, G)
    assert planned == ["filter_moments"]


def test_fake_tensors_stay_fake():
    with FakeTensorMode() as mode:
        w = torch.empty(4, 3)
        assert isinstance(tk.filter_moments([w], [w])[0], torch._subclasses.FakeTensor)
    fake = mode.from_tensor(W)
    assert isinstance(tk.filter_moments(fake, fake), torch._subclasses.FakeTensor)
    assert isinstance(tk.gate_gradients(fake, fake), torch._subclasses.FakeTensor)


def test_what_lies_otherwise_is_copied_or_refused_by_the_dispatcher(planned, monkeypatch):
    wide = torch.randn(4, 6)
    for w, g in [
        (wide[:, ::2], G),
        (W, wide[:, ::2]),
        (torch._neg_view(torch.ones(1, 1)), torch.ones(1, 1)),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (torch._efficientzerotensor((4, 3)), G),
    ]:
        for call in (tk.filter_moments, tk.gate_gradients):
            result = call(w, g)
            assert result.allclose(call(w.clone(), g.clone()))
    assert set(planned) <= {"filter_moments", "gate_gradients"}
    planned.clear()
    tk.filter_moments([W, W.double()], [G, G.double()])
    assert planned == []
    for bad in (None, 3, "grads", G.int(), G.to_sparse(), G.to("meta"), G[:2], [G]):
        with pytest.raises((TypeError, ValueError), match=r"grads|weights"):
            tk.filter_moments(W, bad)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="streams: 3 values"):
        tk.hutchinson_moments([W], [G], seed=0, streams=[0, 1, 2])
    with pytest.raises(TypeError, match="streams: expected"):
        tk.hutchinson_moments([W], [G], seed=0, streams=3)  # type: ignore[call-overload]
    assert planned == []


def test_turned_signs_are_read_however_the_tensor_lies(monkeypatch):
    """As those of x.conj().imag; what is read from a file, or strided anew, has no gaps."""
    from_file = io.BytesIO()
    torch.save(torch._neg_view(torch.randn(4, 3)), from_file)
    from_file.seek(0)
    imaginary = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    turned = [
        torch.load(from_file),
        imaginary[:, :3],
        imaginary.as_strided((4, 3), (3, 1)),
        torch._neg_view(torch.randn(6, 3))[1:5],
        torch.nn.Parameter(torch._neg_view(torch.randn(4, 3))),
        torch._neg_view(torch.randn(3, 4)).t(),
    ]
    bias, weight = torch._neg_view(torch.randn(3)), torch._neg_view(torch.randn(3, 3))
    for w in turned:
        assert w.is_neg()
        for call in (
            lambda w: tk.filter_moments([w, W], [G, G])[0],
            lambda w: tk.filter_moments(W, w),
            lambda w: tk.second_order_moments(W, G, w),
            lambda w: tk.gate_gradients(w, G, bias=bias),
            lambda w: tk.linear_fisher(w, G, weight=weight),
        ):
            got = call(w)
            assert same_bits(got, call(w.resolve_neg()))
            assert same_bits(got, through_the_dispatcher(monkeypatch, lambda: call(w)))  # noqa: B023


def test_a_dimension_beyond_64_bits_is_no_dimension():
    for dim in (2**63, -(2**70), 2**64 + 1):
        with pytest.raises(ValueError, match=f"channel_dim: {dim} is not a dimension"):
            tk.gate_gradients(W, G, channel_dim=dim)


def test_tensors_that_change_between_calls_are_read_anew(planned):
    """Nothing is kept of a call: swapped data, other strides, dtypes and sizes, a new gradient."""
    weight = torch.nn.Parameter(torch.randn(6, 4))
    grad = torch.randn(6, 4)

    def check() -> None:
        w, g = weight.detach().double(), grad.double()
        got = tk.filter_moments([weight], [grad])[0]
        expected = torch.stack([(w * w).sum(1), (g * g).sum(1)], 1)
        # Of sums of at most 24 squares, each of them rounded.
        rtol = 32 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got[:, 3:].double(), expected, rtol=rtol, atol=0)

    check()
    weight.data = torch.randn(6, 4)
    check()
    weight.data, grad = torch.randn(4, 6).t(), torch.randn(6, 4)
    check()
    weight.data, grad = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    check()
    with torch.no_grad():
        weight.set_(torch.randn(2, 7).double())
    grad.resize_(2, 7).normal_()
    check()
    for _ in range(20):  # addresses that come again for other shapes
        rows = int(torch.randint(1, 9, ()))
        weight, grad = (
            torch.nn.Parameter(torch.randn(rows, 24 // rows)),
            torch.randn(rows, 24 // rows),
        )
        check()
    assert len(planned) == 24


@pytest.mark.parametrize("direct", [True, False])
def test_results_require_no_gradient_and_share_one_table(direct, monkeypatch):
    """Each may be written in place all the same, by what requires a gradient too."""
    monkeypatch.setattr(native, "plans_calls", direct and native.plans_calls)
    weights = [torch.randn(3, 2, requires_grad=True) for _ in range(4)]
    tables = tk.filter_moments(weights, [w.detach() for w in weights])
    assert not any(table.requires_grad for table in tables)
    assert len({table.untyped_storage().data_ptr() for table in tables}) == 1
    tables[0].mul_(torch.ones(5, requires_grad=True))
    assert tables[0].requires_grad
    assert not tables[1].requires_grad


def test_modes_of_memory_are_kept(poisoned_memory):
    assert not tk.filter_moments([W, W], [G, G], dim=(0, 1))[1][0].isnan().any()
