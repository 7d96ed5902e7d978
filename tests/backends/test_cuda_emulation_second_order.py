"""second_order_moments.cu, hutchinson_moments.cu and rademacher.cu on a CPU: see emulated.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylor_kernels.layout import RademacherItem
from tests.helpers import emulated, probes
from tests.helpers.cases import (
    DTYPES,
    MomentsCase,
    assert_close,
    lay_out,
    random_like_case,
    same_bits,
)
from tests.helpers.emulated import MOMENTS_CASES, kernels, run_moments
from tests.helpers.parameter_ops import HUTCHINSON, SECOND_ORDER, SEED, ParameterOp

OPS = pytest.mark.parametrize("op", [SECOND_ORDER, HUTCHINSON], ids=lambda op: op.name)
AXES = ((True, False), (False, True), (True, True))
Tables = list[tuple[Tensor | None, Tensor | None]]


def run(
    op: ParameterOp, tensors: list[tuple[Tensor, ...]], groups: list[int], axes: tuple[bool, bool]
) -> Tables:
    seed = (SEED,) if op is HUTCHINSON else ()
    return run_moments(op.name, tensors, groups, *axes, op.sums, *seed)


@pytest.mark.sample
@OPS
@pytest.mark.parametrize("case", MOMENTS_CASES, ids=lambda case: case.name)
def test_sums(op: ParameterOp, case: MomentsCase) -> None:
    for dtype in DTYPES:
        tensors = random_like_case(case, dtype, count=op.lists)
        for axes in AXES if len(case.shape) > 1 else AXES[:1]:
            for dim, got in enumerate(run(op, [tensors], [case.groups], axes)[0]):
                if got is not None:
                    assert_close(got, *op.reference64(tensors, dim, case.groups))


@OPS
def test_bits_depend_on_the_shape_alone(op: ParameterOp) -> None:
    """Not on the address, nor on what else is in the list."""
    cases = [case for case in MOMENTS_CASES if len(case.shape) > 1 and case.layout == "contiguous"]
    filler = [(torch.zeros(3, 4),) * op.lists]
    for i, case in enumerate(cases):
        tensors = random_like_case(case, DTYPES[i % 3], count=op.lists)
        moved = tuple(lay_out(t, "misaligned") for t in tensors)
        for axes in AXES:
            alone = run(op, [tensors], [case.groups], axes)[0]
            again = run(op, [moved, *filler], [case.groups, 1], axes)[0]
            assert all(same_bits(*both) for both in zip(alone, again, strict=True)), case.name


def test_items_have_streams_of_their_own() -> None:
    cases = [MomentsCase("a", (5, 33)), MomentsCase("b", (12, 8, 3, 3)), MomentsCase("c", (70,))]
    tensors = [random_like_case(case, torch.float32) for case in cases]
    for i, (row_out, _) in enumerate(run(HUTCHINSON, tensors, [1, 1, 1], (True, False))):
        assert row_out is not None
        assert_close(row_out, *HUTCHINSON.reference64(tensors[i], 0, stream=i))


@pytest.mark.parametrize("known", probes.KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(known: tuple[tuple[int, ...], ...]) -> None:
    counter, key, answer = known
    assert tuple(kernels().philox(counter, key[0] | key[1] << 32)) == answer


def test_signs_of_elements_beyond_32_bits() -> None:
    for element in (0, 31, 64, 2**31 - 1, 2**32 + 100, 2**39 + 3, 2**45 - 127):
        for seed in probes.SEEDS:
            bit = kernels().random_signs_at(seed % 2**64, 9, element) & 1
            assert bit == probes.bits(seed, 9, element, element + 1)[0], element


@pytest.mark.parametrize("seed", probes.SEEDS)
def test_rademacher(seed: int) -> None:
    counts = [1, 7, 8, 9, 127, 129, 4096, 20_001, *range(1, 330)]  # more than one launch holds
    out = [torch.full((n,), float("nan"), dtype=DTYPES[i % 3]) for i, n in enumerate(counts)]
    items = [RademacherItem(t, len(t), t.dtype, i) for i, t in enumerate(out)]
    emulated.run("rademacher", items, seed)
    for i, tensor in enumerate(out):
        assert tensor.double().equal(probes.signs(tensor, seed, i)), len(tensor)
