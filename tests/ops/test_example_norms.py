"""Per-example squared gradient norms on the CPU: every way against float64 and a batch-1 loop."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.backends import gram
from tests.helpers import cases
from tests.helpers.example_norms import norms_reference64
from tests.helpers.fisher_cases import FisherCase, fisher_cases, random_fisher_inputs
from tests.helpers.geometries import CONVOLUTIONS
from tests.helpers.programs import run_program

WAYS = ("cpu", "reference", "pixels", "patches")
EVERY_CASE = pytest.mark.parametrize("case", fisher_cases(), ids=lambda case: case.name)
#: Beyond the CPU kernel's limits: chunks of examples, bands of positions, tiles, tasks.
BEYOND = [
    FisherCase("chunks", (100, 20, 33, 25), (34, 20, 1, 1)),
    FisherCase("wide", (2, 3, 4, 601), (20, 3, 3, 3), padding=(1, 1)),
    FisherCase("high_depthwise", (2, 37, 61, 20), (37, 1, 3, 3), padding=(1, 1), groups=37),
    FisherCase("channels", (3, 600, 2, 2), (90, 600, 1, 1)),
    FisherCase("taps", (2, 20, 9, 31), (34, 20, 3, 29), padding=(1, 14)),
    FisherCase("examples", (300, 33, 1, 1), (40, 33, 1, 1)),
]


def norms(case: FisherCase, x: Tensor, dy: Tensor, way: str | None) -> Tensor:
    """By the kernels of a backend, by either kind of Gram matrices, or by the shorter way."""
    if way in ("pixels", "patches"):
        first = [0, 1] if way == "pixels" else [1, 0]
        with (
            patch.object(gram, "is_shorter", lambda *_: True),
            patch.object(gram, "_costs", lambda *_: first),
        ):
            return norms(case, x, dy, None)
    return tk.conv2d_example_norms(x, case.size, dy, *case.geometry, backend=way)


def check(case: FisherCase, dtype: torch.dtype, way: str | None, seed: int | None = None):
    x, dy, _ = random_fisher_inputs(case, dtype, seed=seed)
    got = norms(case, x, dy, way)
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    cases.assert_close(got, *norms_reference64(x, dy, case))


@pytest.mark.sample(148)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@EVERY_CASE
@pytest.mark.parametrize("way", WAYS)
def test_matches_float64(way, case, dtype, poisoned_memory):
    check(case, dtype, way)


@pytest.mark.sample(65)
@pytest.mark.parametrize("case", [*fisher_cases(), *BEYOND], ids=lambda case: case.name)
def test_every_instruction_set_matches_float64(case, each_isa, poisoned_memory):
    check(case, torch.float32, "cpu")


@EVERY_CASE
def test_float64_stays_float64(case):
    x, dy, _ = (t.double() for t in random_fisher_inputs(case, torch.float64))
    for way in WAYS:
        got = norms(case, x, dy, way)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, norms_reference64(x, dy, case)[0])


@given(
    case=CONVOLUTIONS,
    dtype=st.sampled_from(cases.DTYPES),
    way=st.sampled_from([None, *WAYS]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_any_geometry_matches_float64(case, dtype, way, seed):
    check(case, dtype, way, seed)


@given(
    dims=st.sampled_from([1, 3]),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    filters=st.integers(1, 4),
    geometry=st.lists(
        st.tuples(*[st.integers(1, 3)] * 3, st.integers(0, 3), st.integers(1, 7)),
        min_size=3,
        max_size=3,
    ),
    way=st.sampled_from([None, "cpu", "reference"]),
)
@settings(max_examples=100)
def test_one_and_three_dimensions_match_a_batch_1_loop(
    dims, groups, channels, filters, geometry, way
):
    kernel, stride, dilation, padding, more = zip(*geometry[:dims], strict=True)
    image = [max(1, dilation[i] * (kernel[i] - 1) + more[i] - 2 * padding[i]) for i in range(dims)]
    conv = (nn.Conv1d, nn.Conv3d)[dims // 2](
        groups * channels, groups * filters, kernel, stride, padding, dilation, groups, False
    ).double()
    x = torch.randn(3, groups * channels, *image).double()
    dy = torch.randn_like(conv(x))
    op = (tk.conv1d_example_norms, tk.conv3d_example_norms)[dims // 2]
    for workspace in (1, 2**22):
        with patch("taylor_kernels.ops.example_norms.WORKSPACE", workspace):
            got = op(x, conv.weight.shape, dy, stride, padding, dilation, groups, backend=way)
        for i, (one, grad) in enumerate(zip(x, dy, strict=True)):
            (expected,) = torch.autograd.grad((conv(one[None])[0] * grad).sum(), conv.weight)
            torch.testing.assert_close(got[i], expected.square().sum())


@pytest.mark.parametrize("way", [None, "cpu", "reference"])
@pytest.mark.parametrize("shape", [(7,), (1,), (4, 9), (2, 1, 13), (3, 4, 5, 11)], ids=str)
def test_linear_sums_tokens_inside_the_example(way, shape):
    x, dy = torch.randn(*shape, 21), torch.randn(*shape, 18)
    if len(shape) == 2:
        x = torch.randn(4, 21, 9).transpose(1, 2)  # strides of another order are read right
    tokens = (t.double().reshape(shape[0], -1, t.size(-1)) for t in (x, dy))
    expected = torch.einsum("nti,nto->noi", *tokens).square().sum((1, 2))
    got = tk.linear_example_norms(x, dy, backend=way)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_cancel_leave_no_more_than_their_rounding(way):
    """All positions of an example have one pixel, and their output gradients add up to nothing."""
    case = FisherCase("cancels", (4, 30, 5, 6), (40, 30, 1, 1))
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    x = x[:, :, :1, :1].expand_as(x).contiguous()
    dy -= dy.mean((2, 3), keepdim=True)
    got = norms(case, x, dy, way)
    assert (got >= 0).all()
    cases.assert_close(got, *norms_reference64(x, dy, case))


@pytest.mark.parametrize("offset", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("kernel", [1, 3])
def test_small_gradients_of_inputs_far_from_zero_keep_their_norms(kernel, spread, offset):
    """Spreads about an offset, and output gradients that add up to nothing over the positions."""
    x = offset + spread * torch.randn(2, 128, 3, 3)
    dy = torch.randn(2, 128, 3, 3)
    dy -= dy.mean((2, 3), keepdim=True)
    size = (128, 128, kernel, kernel)
    x = F.pad(x, 4 * [kernel // 2], mode="replicate")
    with patch.object(gram, "conv2d_example_norms", wraps=gram.conv2d_example_norms) as taken:
        got = tk.conv2d_example_norms(x, size, dy)
        tokens = x[:, :, :3, :3].flatten(2).mT, dy.flatten(2).mT
        linear = tk.linear_example_norms(*tokens)
        assert taken.call_count == 2
    expected = [
        torch.nn.grad.conv2d_weight(one[None], size, grad[None]).square().sum()
        for one, grad in zip(x.double(), dy.double(), strict=True)
    ]
    torch.testing.assert_close(got.double(), torch.stack(expected), rtol=5e-3, atol=0)
    of_tokens = torch.einsum("nti,nto->noi", *(t.double() for t in tokens)).square().sum((1, 2))
    torch.testing.assert_close(linear.double(), of_tokens, rtol=5e-3, atol=0)


@pytest.mark.parametrize("image", [(150, 170), (1, 20000), (1000, 1100)], ids=str)
def test_long_sums_of_one_sign_keep_their_precision(image):
    case = FisherCase("long", (2, 2, *image), (3, 2, 1, 1))
    x, dy, _ = (t.abs() for t in random_fisher_inputs(case, torch.float32))
    cases.assert_close(norms(case, x, dy, "cpu"), *norms_reference64(x, dy, case))


def test_bits_do_not_depend_on_threads_or_repeats(keep_threads):
    for case in (*BEYOND, *fisher_cases()):
        x, dy, _ = random_fisher_inputs(case, torch.float32)
        runs = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            runs.append(norms(case, x, dy, "cpu"))
        assert all(run.equal(runs[0]) for run in runs), case.name


def test_the_bits_of_gram_matrices_repeat():
    for case in BEYOND:
        x, dy, _ = random_fisher_inputs(case, torch.float32)
        if case.grad_shape[2] * case.grad_shape[3] < 500:
            assert norms(case, x, dy, "patches").equal(norms(case, x, dy, "patches")), case.name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", [1, 2, 12])
def test_non_finite_values_reach_their_example_and_no_other(way, groups):
    case = FisherCase("bad", (4, 12, 6, 6), (12, 12 // groups, 3, 3), padding=(1, 1), groups=groups)
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    dy[1, 3, 2, 3] = float("inf")
    x[3, 7, 3, 2] = float("nan")
    assert norms(case, x, dy, way).isfinite().tolist() == [True, False, True, False]


def test_the_shorter_way_is_taken_where_no_backend_is_named():
    few = torch.randn(2, 256, 4, 4), (256, 256, 3, 3), torch.randn(2, 256, 4, 4), 1, 1
    many = torch.randn(2, 8, 40, 40), (8, 8, 3, 3), torch.randn(2, 8, 40, 40), 1, 1
    with patch.object(gram, "conv2d_example_norms", wraps=gram.conv2d_example_norms) as taken:
        for call, expected in ((many, 0), (few, 1)):
            tk.conv2d_example_norms(*call)
            assert taken.call_count == expected
            tk.conv2d_example_norms(*call, backend="cpu")
            assert taken.call_count == expected


@pytest.mark.parametrize(("capability", "taken"), [((9, 0), True), ((8, 6), False)])
def test_gpus_without_float64_units_compute_gradients(capability, taken):
    sides = (4, 4), (4, 4), (64, 64, 3, 3), (1, 1), 1
    with patch("torch.cuda.get_device_capability", lambda _: capability):
        assert gram.is_shorter(*sides, torch.device("cuda"), torch.float32) is taken


def test_gram_matrices_keep_float32_under_autocast():
    x, dy = torch.randn(4, 5, 60), torch.randn(4, 5, 50)
    expected = tk.linear_example_norms(x, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tk.linear_example_norms(x, dy).equal(expected)


def test_no_tensor_of_all_gradients_is_made():
    script = """
import torch
import taylor_kernels as tk

def peak():  # in MiB; ru_maxrss would begin at the peak of the process that starts this one
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024

def growth(run):
    before = peak()
    run()
    return peak() - before

torch.set_num_threads(1)
x, dy, size = torch.ones(8, 512, 4, 4), torch.ones(8, 1024, 4, 4), (1024, 512, 3, 3)
for backend in ("cpu", None):
    tk.conv2d_example_norms(x[:, :4], (1024, 4, 3, 3), dy, 1, 1, backend=backend)
ballast = torch.ones(64, 2**18)  # more than was ever in use and then freed
norms = tk.conv2d_example_norms
ours = [growth(lambda: norms(x, size, dy, 1, 1, backend=b)) for b in ("cpu", None)]
one = growth(lambda: torch.nn.grad.conv2d_weight(x[:1], size, dy[:1], 1, 1))
print(*ours, one)
"""
    run = run_program(script)
    assert run.returncode == 0, run.stderr
    kernels, shorter, one = map(int, run.stdout.split())
    assert one >= 17  # one example's gradient has 18 MiB: this measurement would see it
    assert max(kernels, shorter) <= 8


def test_is_what_autograd_gives_example_by_example():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2).double()
    x, target = torch.randn(5, 6, 9, 9).double(), torch.randn(5, 8, 5, 5).double()
    expected = []
    for one, wanted in zip(x, target, strict=True):
        loss = F.mse_loss(conv(one[None]), wanted[None], reduction="sum")
        expected.append(torch.autograd.grad(loss, conv.weight)[0].square().sum())
    y = conv(x)
    (dy,) = torch.autograd.grad(F.mse_loss(y, target, reduction="sum"), y)
    for backend in (None, "cpu", "reference"):
        got = tk.conv2d_example_norms(x, conv.weight.shape, dy, 2, 1, groups=2, backend=backend)
        torch.testing.assert_close(got, torch.stack(expected))
