"""conv2d_fisher.cu on a CPU: see emulated.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from taylor_kernels.layout import Conv2dFisherArgs, conv2d_fisher_args
from tests.helpers.cases import (
    DTYPES,
    EPS32,
    TF32_C,
    FisherCase,
    assert_close,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
    same_bits,
)
from tests.helpers.emulated import kernels, poisoned
from tests.helpers.fisher_limits import (
    LAYERS,
    LIMIT_CASES,
    LIMITS,
    PIPELINED,
    PIPELINED_CASES,
    PIPELINED_LONG,
    TURNED,
    Kernel,
    both_orders,
)

ROOM = 64 << 20  # bytes of workspace
CASES = [case for case in fisher_cases() if 0 not in case.shape]  # the op answers for the empty


def planned(args: Conv2dFisherArgs, room: int) -> tuple[Kernel, int, int]:
    """The kernel, its splits of the examples, the bytes that it takes of a workspace."""
    kernel, splits, workspace = kernels().fisher_plan(args, room)
    return Kernel(kernel), splits, workspace


def fisher(
    x: Tensor,
    dy: Tensor,
    case: FisherCase,
    weight: Tensor | None = None,
    tf32: bool = False,
    room: int = ROOM,
) -> Tensor:
    out = torch.full(case.size if weight is None else case.size[:1], float("nan"))
    args = conv2d_fisher_args(x, dy, weight, case.size, *case.geometry, tf32, out)
    assert kernels().fisher(args, room, poisoned(planned(args, room)[2])) == 0
    return out


def plan(
    case: FisherCase,
    dtype: torch.dtype,
    weighted: bool = False,
    room: int = ROOM,
    tf32: bool = True,
) -> tuple[Kernel, int, int]:
    """The same for tensors that nobody reads."""
    nothing = torch.empty(1, dtype=dtype)
    args = Conv2dFisherArgs(
        input=nothing,
        grad_output=nothing,
        weight=nothing if weighted else None,
        out=nothing,
        batch=case.shape[0],
        groups=case.groups,
        channels=case.size[1],
        filters=case.size[0] // case.groups,
        image=case.shape[2:],
        out_image=tuple(case.grad_shape[2:]),
        kernel=case.size[2:],
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        dtype=dtype,
        weight_dtype=torch.float32,
        input_channels_last=case.layout == "channels_last",
        grad_channels_last=case.grad_layout == "channels_last",
        tf32=tf32,
    )
    return planned(args, room)


def nearest_tf32(tensor: Tensor) -> Tensor:
    """float32 with 10 bits of fraction, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def moved(tensor: Tensor, elements: int) -> Tensor:
    """The same values in the same order, so many elements past an aligned address."""
    base = tensor.new_empty(tensor.numel() + 32)
    start = -base.data_ptr() % 64 // base.element_size() + elements
    return base[start:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LIMIT_CASES], ids=lambda case: case.name)
def test_matches_float64(case: FisherCase, dtype: torch.dtype) -> None:
    x, dy, weight = random_fisher_inputs(case, dtype)
    for scaled in (None, weight):
        got = fisher(x, dy, case, scaled)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", Kernel)
def test_weight_of_the_inputs_dtype(kernel: Kernel, dtype: torch.dtype) -> None:
    case = next(case for case, met in (*PIPELINED, *LIMITS) if met == kernel)
    x, dy, weight = (t.to(dtype) for t in random_fisher_inputs(case, dtype))
    got = fisher(x, dy, case, weight)
    assert_close(got, *fisher_reference64(x, dy, case, weight))


@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_tf32_rounds_factors_and_nothing_else(case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    got = fisher(x, dy, case, tf32=True)
    assert_close(got, *fisher_reference64(x, dy, case), c=TF32_C)
    kernel, _, _ = plan(case, torch.float32)
    if kernel <= Kernel.SMALL:
        x, dy = nearest_tf32(x), nearest_tf32(dy)
    assert_close(got, *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_bits_do_not_depend_on_alignment(case: FisherCase, dtype: torch.dtype) -> None:
    x, dy, _ = random_fisher_inputs(case, dtype)
    weight = torch.randn(case.size) if case in PIPELINED_CASES else None
    got = fisher(moved(x, 0), moved(dy, 0), case, weight)
    for shifts in ((0, 0), (1, 2), (2, 1)):
        shifted = fisher(moved(x, shifts[0]), moved(dy, shifts[1]), case, weight)
        assert same_bits(got, shifted)


@pytest.mark.parametrize(("case", "kernel"), LIMITS, ids=lambda value: getattr(value, "name", None))
def test_limits_meet_the_kernel_they_are_for(case: FisherCase, kernel: Kernel) -> None:
    tiles = kernel in (Kernel.TALL, Kernel.WIDE)
    found, splits, _ = plan(case, torch.float32 if tiles else torch.bfloat16, tf32=not tiles)
    assert found == kernel or (found < kernel == Kernel.SMALL)  # by one that copies
    assert splits > 1 or "splits" not in case.name
    assert plan(case, torch.bfloat16, room=1)[1:] == (1, 0)


@pytest.mark.parametrize(("case", "kernel"), [*PIPELINED, *TURNED], ids=lambda v: v.name)
def test_pipelined_shapes_meet_their_kernel(case: FisherCase, kernel: Kernel) -> None:
    turned = case in dict(TURNED)
    found, _, workspace = plan(case, torch.bfloat16)
    assert found == kernel
    assert workspace > 0 or not turned
    without_room = plan(case, torch.bfloat16, room=1)
    assert without_room == (Kernel.SMALL if turned else kernel, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=("squares", "filters"))
def test_examples_are_turned_in_slices(weighted: bool, dtype: torch.dtype) -> None:
    """A workspace for two or three examples: each slice adds to what those before it have left."""
    case = FisherCase("slices", (8, 20, 6, 5), (40, 20, 3, 3), padding=(1, 1))
    x, dy, weight = random_fisher_inputs(case, dtype)
    scaled = weight if weighted else None
    example = 2 * (20 + 40) * 30
    for held in (1, 3):
        room = 2 * (held * example)
        kernel, _, workspace = plan(case, dtype, weighted, room)
        assert kernel == Kernel.HALF_BLOCK
        assert 0 < workspace <= room + 2 * 256  # each side begins at a boundary
        got = fisher(x, dy, case, scaled, room=room)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))
        assert same_bits(got, fisher(x, dy, case, scaled, room=room))


@pytest.mark.parametrize("case", PIPELINED_LONG, ids=lambda case: case.name)
def test_pipelined_sums_of_sums(case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.float16)
    assert plan(case, torch.float16, room=1)[0] == Kernel.HALF_BLOCK
    assert_close(fisher(x, dy, case, room=1), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize(("case", "kernel"), [PIPELINED[1], PIPELINED[6]], ids=lambda v: v.name)
def test_bits_do_not_depend_on_stages(case: FisherCase, kernel: Kernel) -> None:
    """A GPU with less shared memory gets fewer, and launches no more than it has."""
    case = case._replace(shape=(*case.shape[:2], 15, 10))  # spans, whose sums take memory too
    x, dy, _ = random_fisher_inputs(case, torch.float16)
    module = kernels()
    expected = fisher(x, dy, case)
    launched = []
    for limit in (227 << 10, 110 << 10, 99 << 10):
        module.set_shared_limit(limit)
        try:
            assert same_bits(expected, fisher(x, dy, case))
        finally:
            module.set_shared_limit(163 << 10)
        launched.append(max(module.launched_shared()[-3:]))
        assert launched[-1] <= limit
    assert_close(expected, *fisher_reference64(x, dy, case))
    assert kernel == Kernel.HALF_BLOCK or len(set(launched)) > 1


@pytest.mark.parametrize(
    ("case", "_"), [*PIPELINED[:2], PIPELINED[3], PIPELINED[6]], ids=lambda v: v.name
)
def test_a_missing_wait_or_barrier_would_show(case: FisherCase, _: Kernel) -> None:
    """Copies land when they are waited for, and others see them after a barrier: without one of the
    first two stages the kernel multiplies what is not there yet. Barriers that guard what is read
    from being written over, as behind the last chunk, are not tried."""
    x, dy, _ = random_fisher_inputs(case, torch.bfloat16)
    module = kernels()
    for groups in (1, 2):
        module.set_lax_waits(groups)
        try:
            assert fisher(x, dy, case).isnan().any(), f"waits for {groups} groups too few"
        finally:
            module.set_lax_waits(0)
    reference = fisher_reference64(x, dy, case)
    for barrier in range(2, 4):  # those of the first two stages
        module.set_skipped_barrier(barrier)
        try:
            got = fisher(x, dy, case)
        finally:
            module.set_skipped_barrier(-1)
        with pytest.raises(AssertionError, match="are off"):
            assert_close(got, *reference)
    assert_close(fisher(x, dy, case), *reference)


@pytest.mark.parametrize(("case", "kernel"), LAYERS.items(), ids=lambda value: value.name)
def test_layers_get_their_kernel(case: FisherCase, kernel: Kernel) -> None:
    for layer in both_orders(case):
        for weighted in (False, True):
            found, _, workspace = plan(layer, torch.bfloat16, weighted)
            assert found == kernel
            assert workspace <= ROOM + 2 * 256


#: Bits below the largest that a tensor core keeps, and the groups in which it takes a step.
TENSOR_CORES = {"a100": (24, 2), "h100": (25, 1)}


@pytest.fixture(params=TENSOR_CORES)
def tensor_core(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    kernels().set_tensor_core(*TENSOR_CORES[request.param])
    yield TENSOR_CORES[request.param]
    kernels().set_tensor_core(*TENSOR_CORES["a100"])  # the one that keeps less


@pytest.mark.parametrize("image", [(8, 8), (8, 16), (60, 70), (128, 130)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
def test_sums_of_one_sign_stay_exact(
    dtype: torch.dtype | str, image: tuple[int, int], tensor_core: tuple[int, int]
) -> None:
    """Tensor cores cut off: a sum of all positions in one go would be off by hundreds of units.

    In spans they are off by 10 units on the average at most, and one by another 1.6 units root mean
    square: the average is held to what spans are for, and each to eight times that more.
    """
    tf32 = dtype == "tf32"
    case = FisherCase("long", (2, 17, *image), (8, 17, 1, 1))
    x, dy, _ = random_fisher_inputs(case, torch.float32 if tf32 else dtype)
    x, dy = x.abs(), dy.abs()
    if tf32:
        x, dy = nearest_tf32(x), nearest_tf32(dy)
    got = fisher(x, dy, case, tf32=tf32, room=1)
    reference, bound = fisher_reference64(x, dy, case)
    assert_close(got, reference, bound, c=24)
    assert ((got.double() - reference) / (EPS32 * bound)).mean().abs() < 12


def test_the_emulated_tensor_core_cuts_what_lies_too_low(tensor_core: tuple[int, int]) -> None:
    bits, _ = tensor_core
    add = kernels().add_products
    for count in (4, 8, 16):
        factors = torch.randn(2, count).half().float() * 2.0 ** torch.randint(-6, 6, (2, count))
        start = float(torch.randn(()) * 2.0 ** int(torch.randint(-9, 9, ())))
        a, b = factors.tolist()
        exponents = [math.frexp(start)[1] - 1]
        exponents += [math.frexp(p)[1] + math.frexp(q)[1] - 2 for p, q in zip(a, b, strict=True)]
        unit = Fraction(2) ** (max(exponents) - bits)
        terms = [Fraction(start), *(Fraction(p) * Fraction(q) for p, q in zip(a, b, strict=True))]
        kept = sum(int(term / unit) for term in terms) * unit  # int() cuts towards zero
        step = Fraction(2) ** (math.frexp(float(kept))[1] - 24)
        assert Fraction(add(start, a, b)) == int(kept / step) * step
    assert add(1.0, [2.0**-12] * 8, [2.0 ** (-12 - bits + 24)] * 8) == 1 + 2.0 ** (3 - bits)
    assert add(1.0, [2.0**-12] * 8, [2.0 ** (-13 - bits + 24)] * 8) == 1
    assert math.isinf(add(1.0, [float("inf")], [2.0]))
    assert math.isnan(add(1.0, [float("inf")], [0.0]))


@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_one_block_takes_all_examples(case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.bfloat16)
    assert_close(fisher(x, dy, case, room=1), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("batch", [256, 600])
def test_runs_of_examples(batch: int) -> None:
    case = FisherCase("runs", (batch, 40, 1, 1), (9, 40, 1, 1))
    for dtype in DTYPES:
        x, dy, _ = random_fisher_inputs(case, dtype)
        assert_close(fisher(x, dy, case, room=1), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values_reach_their_filter_and_no_other(dtype: torch.dtype) -> None:
    for case in CASES:
        if case.size[0] < 8:
            continue
        x, dy, weight = random_fisher_inputs(case, dtype)
        dy[0, 3, -1, -1] = float("inf")
        dy[-1, 7, 0, 0] = float("nan")
        for scaled in (None, weight):
            bad = ~fisher(x, dy, case, scaled).view(dy.size(1), -1).isfinite().all(1)
            assert bad.nonzero().flatten().tolist() == [3, 7], case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_pixels_reach_what_reads_them(dtype: torch.dtype) -> None:
    for case in CASES:
        x, dy, _ = random_fisher_inputs(case, dtype)
        x[0, 0, -1, -1] = float("inf")  # next to what lies beyond the last position
        x[-1, -1, 0, -1] = float("nan")
        assert_close(fisher(x, dy, case), *fisher_reference64(x, dy, case))
