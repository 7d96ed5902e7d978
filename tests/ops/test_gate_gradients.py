"""gate_gradients on the CPU: every backend against float64, and the identity it rests on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_kernels as tk
from tests.helpers import cases

BACKENDS = ("cpu", "reference")


def check(case: cases.GateCase, dtype: torch.dtype, backend: str | None, seed=None) -> None:
    output, grad = cases.random_like_case(case, dtype, seed=seed)
    bias = cases.random_bias(case, dtype)
    got = tk.gate_gradients(output, grad, bias=bias, channel_dim=case.channel_dim, backend=backend)
    cases.assert_close(got, *cases.gate_reference64(output, grad, bias, case.channel_dim))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.gate_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, case, dtype, poisoned_memory):
    check(case, dtype, backend)


@pytest.mark.parametrize("case", cases.gate_cases(), ids=lambda case: case.name)
def test_every_instruction_set_matches_float64(case, each_isa, poisoned_memory):
    for dtype in cases.DTYPES:
        check(case, dtype, "cpu")


@given(
    shape=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    channel_dim=st.integers(1, 3),
    layout=st.sampled_from(["contiguous", "channels_last", "misaligned", "strided"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_any_shape_matches_float64(shape, channel_dim, layout, bias, seed):
    case = cases.GateCase("any", tuple(shape), min(channel_dim, len(shape) - 1), layout, bias)
    check(case, torch.float32, None, seed)


def test_bits_do_not_depend_on_threads_or_repeats(keep_threads):
    output, grad = torch.randn(2, 8, 96, 40, 40)
    for layout in (torch.contiguous_format, torch.channels_last):
        y, dy = (t.contiguous(memory_format=layout) for t in (output, grad))
        runs = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            runs.append(tk.gate_gradients(y, dy, backend="cpu"))
        assert all(run.equal(runs[0]) for run in runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 5, 33), (2, 5), (3, 5, 4, 4)])
def test_non_finite_values_reach_their_gate_and_no_other(backend, shape):
    output, grad = torch.randn(2, *shape)
    output[1, 3] = float("inf")
    bias = torch.zeros(5)
    bias[4] = float("nan")
    got = tk.gate_gradients(output, grad, bias=bias, backend=backend)
    cases.assert_close(got, *cases.gate_reference64(output, grad, bias))
    assert got[:, :3].isfinite().all()


def test_an_expanded_gradient_is_read_right():
    output = torch.randn(3, 4, 5, 5)
    grad = torch.tensor(0.25).expand(3, 4, 5, 5)  # what mean() hands back
    cases.assert_close(tk.gate_gradients(output, grad), *cases.gate_reference64(output, grad))


def test_a_bias_in_float32_beside_half_outputs():
    output, grad = torch.randn(2, 3, 8, 5).bfloat16()
    bias = torch.randn(8)
    got = tk.gate_gradients(output, grad, bias=bias)
    cases.assert_close(got, *cases.gate_reference64(output, grad, bias.bfloat16()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)),
        (torch.nn.Conv2d(6, 9, 3, groups=3, dilation=2), (4, 6, 9, 9)),
        (torch.nn.Linear(7, 5), (4, 7)),
        (torch.nn.Linear(7, 5), (4, 3, 7)),
    ],
    ids=["conv", "grouped conv", "linear", "linear over tokens"],
)
def test_equals_the_per_example_weight_gradient_times_the_weight(layer, shape):
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    y.sin().sum().backward()
    channel_dim = 1 if y.dim() == 4 else -1
    s = tk.gate_gradients(y.detach(), y.grad, bias=layer.bias.detach(), channel_dim=channel_dim)
    for n in range(len(x)):
        (g,) = torch.autograd.grad(layer(x[n : n + 1]).sin().sum(), layer.weight)
        torch.testing.assert_close(s[n], (g * layer.weight).flatten(1).sum(1), rtol=0, atol=1e-10)


def test_the_op_passes_torch_opcheck():
    y, dy = torch.randn(2, 3, 4, 5)
    for bias in (None, torch.randn(4)):
        torch.library.opcheck(
            torch.ops.taylor_kernels.gate_gradients.default, (y, dy, bias, 1, None)
        )


def test_scores_are_not_differentiable():
    y, dy = F.relu(torch.randn(2, 3, requires_grad=True)), torch.randn(2, 3)
    assert not tk.gate_gradients(y, dy).requires_grad
    for backend in BACKENDS:
        got = torch.ops.taylor_kernels.gate_gradients(y, dy, None, 1, backend)
        assert got.equal(tk.gate_gradients(y, dy))
        assert not got.requires_grad


def test_vmap_gives_the_bits_of_each_slice():
    y, dy, bias = torch.randn(3, 4, 6, 2), torch.randn(3, 4, 6, 2), torch.randn(3, 6)
    for shift, dim in ((None, None), (bias[0], None), (bias, 0)):

        def gates(y, dy, shift):
            return tk.gate_gradients(y, dy, bias=shift)

        got = torch.vmap(gates, in_dims=(0, 0, dim))(y, dy, shift)
        for i in range(3):
            assert got[i].equal(gates(y[i], dy[i], shift if dim is None else shift[i]))


Y = torch.randn(4, 6, 3, 3)
BAD_INPUTS = {
    "shape": (dict(output=Y, grad_output=Y[:2]), ValueError, "grad_output: shape"),
    "dtype": (dict(output=Y, grad_output=Y.double()), ValueError, "grad_output: dtype"),
    "integer": (
        dict(output=Y.long(), grad_output=Y.long()),
        TypeError,
        "output: dtype torch.int64",
    ),
    "meta": (dict(output=Y.to("meta"), grad_output=Y), TypeError, "output: a meta tensor"),
    "sparse": (dict(output=Y.to_sparse(), grad_output=Y), TypeError, "output: layout"),
    "none": (dict(output=Y, grad_output=None), TypeError, "grad_output: .*NoneType"),
    "vector": (
        dict(output=Y[0, 0, 0], grad_output=Y[0, 0, 0]),
        ValueError,
        r"output: has shape \(3,\)",
    ),
    "example_dim": (dict(output=Y, grad_output=Y, channel_dim=0), ValueError, "channel_dim: 0 is"),
    "channel_dim": (dict(output=Y, grad_output=Y, channel_dim=4), ValueError, "channel_dim: 4"),
    "bias": (dict(output=Y, grad_output=Y, bias=torch.zeros(5)), ValueError, r"bias: shape \(5,\)"),
    "backend": (
        dict(output=Y, grad_output=Y, backend="triton"),
        ValueError,
        "'triton' does not run",
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.gate_gradients(**arguments)
