"""conv2d_fisher and linear_fisher on the CPU: every backend against float64 and a batch-1 loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_kernels as tk
from tests.helpers import cases
from tests.helpers.fisher_cases import (
    FisherCase,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
)
from tests.helpers.geometries import CONVOLUTIONS
from tests.helpers.programs import run_program

BACKENDS = ("cpu", "reference")
EVERY_CASE = pytest.mark.parametrize("case", fisher_cases(), ids=lambda case: case.name)


def check(
    case: FisherCase, dtype: torch.dtype, backend: str | None, seed: int | None = None
) -> None:
    x, dy, weight = random_fisher_inputs(case, dtype, seed=seed)
    for scaled in (None, weight):
        got = tk.conv2d_fisher(x, case.size, dy, *case.geometry, weight=scaled, backend=backend)
        assert got.dtype == torch.float32
        cases.assert_close(got, *fisher_reference64(x, dy, case, scaled))


@pytest.mark.sample(110)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@EVERY_CASE
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, case, dtype, poisoned_memory):
    check(case, dtype, backend)


@EVERY_CASE
def test_every_instruction_set_matches_float64(case, each_isa, poisoned_memory):
    for dtype in cases.DTYPES:
        check(case, dtype, "cpu")


def check_float64(case: FisherCase, backend: str) -> None:
    x, dy, weight = (t.double() for t in random_fisher_inputs(case, torch.float64))
    for scaled in (None, weight):
        got = tk.conv2d_fisher(x, case.size, dy, *case.geometry, weight=scaled, backend=backend)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, fisher_reference64(x, dy, case, scaled)[0])


@EVERY_CASE
def test_float64_stays_float64(case):
    check_float64(case, "reference")


@EVERY_CASE
def test_every_instruction_set_keeps_float64(case, each_isa):
    check_float64(case, "cpu")


# Shapes past the CPU kernel's limits, in both directions where there are two.
BEYOND = [
    FisherCase("chunks", (100, 20, 33, 25), (34, 20, 1, 1)),
    FisherCase("wide", (2, 3, 4, 601), (20, 3, 3, 3), padding=(1, 1)),
    FisherCase("high_depthwise", (2, 37, 61, 20), (37, 1, 3, 3), padding=(1, 1), groups=37),
    FisherCase("channels", (3, 600, 2, 2), (9, 600, 1, 1)),
    FisherCase("taps", (2, 20, 9, 31), (34, 20, 3, 29), padding=(1, 14)),
    FisherCase("examples", (300, 33, 1, 1), (40, 33, 1, 1)),
]


@pytest.mark.parametrize("case", BEYOND, ids=lambda case: case.name)
def test_every_instruction_set_beyond_its_limits(case, each_isa, poisoned_memory):
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("image", [(150, 170), (1, 20000), (20000, 1), (1000, 1100)], ids=str)
def test_long_sums_of_one_sign_keep_their_precision(image, each_isa):
    case = FisherCase("long", (2, 2, *image), (3, 2, 1, 1))
    x, dy, _ = (t.abs() for t in random_fisher_inputs(case, torch.float32))
    got = tk.conv2d_fisher(x, case.size, dy, backend="cpu")
    cases.assert_close(got, *fisher_reference64(x, dy, case))


@given(
    case=CONVOLUTIONS,
    dtype=st.sampled_from(cases.DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_any_geometry_matches_float64(case, dtype, seed):
    check(case, dtype, None, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_what_autograd_gives_example_by_example(backend):
    conv = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False).double()
    x, target = torch.randn(5, 6, 9, 9).double(), torch.randn(5, 8, 5, 5).double()
    expected = torch.zeros_like(conv.weight)
    for one, wanted in zip(x, target, strict=True):
        loss = F.mse_loss(conv(one[None]), wanted[None], reduction="sum")
        expected += torch.autograd.grad(loss, conv.weight)[0].square()
    y = conv(x)
    (dy,) = torch.autograd.grad(F.mse_loss(y, target, reduction="sum"), y)
    got = tk.conv2d_fisher(x, conv.weight.shape, dy, 2, 1, groups=2, backend=backend)
    torch.testing.assert_close(got, expected)
    reduced = tk.conv2d_fisher(
        x, conv.weight.shape, dy, 2, 1, groups=2, weight=conv.weight, backend=backend
    )
    torch.testing.assert_close(reduced, (expected * conv.weight.square()).flatten(1).sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (1,), (4, 9), (2, 1, 13), (3, 4, 5, 11)], ids=str)
def test_linear_sums_tokens_inside_the_example(backend, shape):
    x, dy = torch.randn(*shape, 21), torch.randn(*shape, 18)
    if len(shape) == 2:
        x = torch.randn(4, 21, 9).transpose(1, 2)  # strides of another order are read right
    weight = torch.randn(18, 21)
    tokens = (t.double().reshape(shape[0], -1, t.size(-1)) for t in (x, dy))
    expected = torch.einsum("nti,nto->noi", *tokens).square().sum(0)
    got = tk.linear_fisher(x, dy, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    got = tk.linear_fisher(x, dy, weight=weight, backend=backend)
    expected = (expected * weight.double().square()).sum(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_of_a_linear_softmax_model_is_its_closed_form():
    x, weight = torch.randn(40, 12).double(), torch.randn(7, 12).double()
    p = (x @ weight.T).softmax(1)
    # Drawn from the model, label y has probability p_y and gradient (p − onehot(y)) xᵀ.
    expected = torch.einsum("no,ni->oi", p * (1 - p), x.square())
    got = torch.zeros_like(expected)
    for label in range(7):
        dy = p - F.one_hot(torch.tensor(label), 7)
        got += tk.linear_fisher(x, dy * p[:, label, None].sqrt())
    torch.testing.assert_close(got, expected)


def test_bits_do_not_depend_on_threads_or_repeats(keep_threads):
    for case in (*BEYOND, *fisher_cases()):
        x, dy, weight = random_fisher_inputs(case, torch.float32)
        for scaled in (None, weight):
            runs = []
            for threads in (1, 2, 5, 2):
                torch.set_num_threads(threads)
                runs.append(
                    tk.conv2d_fisher(x, case.size, dy, *case.geometry, weight=scaled, backend="cpu")
                )
            assert all(run.equal(runs[0]) for run in runs), case.name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 12])
def test_non_finite_values_reach_their_filter_and_no_other(backend, groups):
    x, dy = torch.randn(2, 12, 6, 6), torch.randn(2, 12, 6, 6)
    dy[0, 3, 2, 3] = float("inf")
    dy[1, 7, 3, 2] = float("nan")
    size = (12, 12 // groups, 3, 3)
    for weight in (None, torch.randn(size)):
        got = tk.conv2d_fisher(x, size, dy, 1, 1, groups=groups, weight=weight, backend=backend)
        bad = ~got.isfinite().flatten(1).all(1) if weight is None else ~got.isfinite()
        assert bad.nonzero().flatten().tolist() == [3, 7]


def test_with_a_weight_nothing_of_its_size_is_allocated():
    script = """
import torch
import taylor_kernels as tk

def peak():  # in MiB; ru_maxrss would begin at the peak of the process that starts this one
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024

def growth(weight):
    before = peak()
    tk.conv2d_fisher(x, (2048, 1024, 3, 3), dy, 1, 1, weight=weight, backend="cpu")
    return peak() - before

x, dy, weight = torch.ones(3, 1024, 2, 2), torch.ones(3, 2048, 2, 2), torch.ones(2048, 1024, 3, 3)
tk.conv2d_fisher(x[:, :4], (2048, 4, 3, 3), dy, 1, 1, backend="cpu")
ballast = torch.ones(256, 2**18)  # more than was ever in use and then freed
print(growth(weight), growth(None))
"""
    run = run_program(script)
    assert run.returncode == 0, run.stderr
    with_weight, without = map(int, run.stdout.split())
    assert without >= 70  # the result has 72 MiB: this measurement would see them
    assert with_weight <= 8


def test_large_and_small_factors_do_not_overflow_apart():
    x, dy = torch.full((2, 3, 1, 1), 1e25), torch.full((2, 4, 1, 1), 1e-25)
    torch.testing.assert_close(tk.conv2d_fisher(x, (4, 3, 1, 1), dy), torch.full((4, 3, 1, 1), 2.0))
