"""conv2d_fisher.cu on a CPU: see emulated.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import DTYPES, assert_close, same_bits
from tests.helpers.emulated import kernels
from tests.helpers.emulated_fisher import ROOM, fisher, nearest_tf32, plan
from tests.helpers.fisher_cases import (
    TF32_C,
    FisherCase,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
)
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
from tests.helpers.samples import some

CASES = [case for case in fisher_cases() if 0 not in case.shape]  # the op answers for the empty


def moved(tensor: Tensor, elements: int) -> Tensor:
    """The same values in the same order, so many elements past an aligned address."""
    base = tensor.new_empty(tensor.numel() + 32)
    start = -base.data_ptr() % 64 // base.element_size() + elements
    return base[start:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.sample
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


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", some(LIMIT_CASES, 36), ids=lambda case: case.name)
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


@pytest.mark.parametrize("dtype", some(DTYPES, 1), ids=str)
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


@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16], 1), ids=str)
def test_non_finite_pixels_reach_what_reads_them(dtype: torch.dtype) -> None:
    for case in CASES:
        x, dy, _ = random_fisher_inputs(case, dtype)
        x[0, 0, -1, -1] = float("inf")  # next to what lies beyond the last position
        x[-1, -1, 0, -1] = float("nan")
        assert_close(fisher(x, dy, case), *fisher_reference64(x, dy, case))
