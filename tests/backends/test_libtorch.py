"""What the native module asks of PyTorch by name: checked first, and nothing is held after."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_kernels as tk
from taylor_kernels.backends import native
from tests.helpers.cases import same_bits
from tests.helpers.programs import run_program

if not native.plans_calls:
    pytest.skip("the native module cannot view tensors of this PyTorch", allow_module_level=True)

ASK = """
import torch, taylor_kernels as tk
from taylor_kernels.backends import native
class Other(torch.Tensor): pass
plain, negated = torch.ones(2, 3), torch._neg_view(torch.ones(2, 3))
python = (torch.Tensor, torch.nn.Parameter, torch.empty, lambda: False)
def connects(samples=(plain,), negated=(negated,), module=torch._C.__file__, python=python):
    return native._native.connect_libtorch(module, *python, list(samples), list(negated))
w, g = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
expected = tk.filter_moments(w, g)
"""


#: What PyTorch might say otherwise, and a call that is told so.
OTHERWISE = {
    "no library": "module='/no/such/library.so'",
    "a library without PyTorch": "module=native._native.__file__",
    "a sample that cannot be viewed": "samples=[plain, torch.ones(2).to_sparse()]",
    "a sample of another class": "samples=[plain.as_subclass(Other)]",
    "negated values that are viewed": "negated=[plain]",
    "no samples": "samples=[]",
    "another class of tensors": "python=(Other, Other, *python[2:])",
}


def test_a_pytorch_that_says_otherwise_is_not_trusted():
    """Calls then go through the dispatcher, to the same result."""
    program = ASK + "".join(
        f"assert connects() and not connects({differently}), {what!r}\n"
        "assert native._native.call_gate_gradients(w, g, None, 1, 1) is None\n"
        "assert tk.filter_moments(w, g).equal(expected)\n"
        for what, differently in OTHERWISE.items()
    )
    run = run_program(program)
    assert run.returncode == 0, run.stderr


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    offset=st.integers(0, 3),
    parameter=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_tensors_are_read_however_they_lie(sizes, order, offset, parameter, dtype):
    """Turned, stepped and cut ones: as copies of them, and as the dispatcher has them read."""
    turned = order.sample(range(len(sizes)), len(sizes))
    step = order.choice([1, 1, 2])
    wide = torch.randn([offset + sizes[d] * step for d in turned]).to(dtype)
    w = wide.permute([turned.index(d) for d in range(len(sizes))])
    w = w[tuple(slice(offset, None, step) for _ in sizes)]
    g = torch.randn(sizes).to(dtype)
    held = torch.nn.Parameter(w) if parameter else w
    got = tk.filter_moments(held, g)
    copied = w.clone(memory_format=torch.preserve_format)
    same_layout = tk.filter_moments(copied, g)
    rtol = 64 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, same_layout, rtol=rtol, atol=rtol * float(got[:, 2].max()))
    assert got.shape == (sizes[0], len(tk.MOMENTS))
    assert tuple(got.stride()) == (len(tk.MOMENTS), 1)


def test_outputs_are_tensors_like_others():
    """In inference mode too, whatever the default dtype; and nothing holds them, or the inputs."""
    weights, grads = ([torch.randn(3, 2) for _ in range(3)] for _ in range(2))
    y = torch.randn(2, 3, 4)

    def results() -> list[torch.Tensor]:
        rows, columns = tk.filter_moments(weights, grads, dim=(0, 1))
        packed = tk.hutchinson_moments(weights, grads, seed=1, packed=True)
        return [*rows, *columns, packed, tk.gate_gradients(y, y)]

    counts = [sys.getrefcount(tensor) for tensor in (*weights, *grads, y)]
    found = results()
    assert all(type(tensor) is torch.Tensor for tensor in found)
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in found)
    kept = [weakref.ref(tensor) for tensor in found]
    values = [tensor.clone() for tensor in found]
    with torch.inference_mode():
        assert all(tensor.is_inference() for tensor in results())
    torch.set_default_dtype(torch.float64)
    try:
        again = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(same_bits, values, again))
    del found
    assert not any(ref() is not None for ref in kept)
    assert counts == [sys.getrefcount(tensor) for tensor in (*weights, *grads, y)]


def test_what_has_no_such_memory_is_refused_as_before():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    with pytest.raises(TypeError, match="weights: nested tensors are not supported"):
        tk.filter_moments(nested, nested)
