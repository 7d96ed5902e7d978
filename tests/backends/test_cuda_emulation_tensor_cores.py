"""What tensor cores cut off of sums: conv2d_fisher.cu on a CPU, see emulated.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from tests.helpers.cases import DTYPES, EPS32, assert_close
from tests.helpers.emulated import kernels
from tests.helpers.emulated_fisher import fisher, nearest_tf32
from tests.helpers.fisher_cases import FisherCase, fisher_reference64, random_fisher_inputs

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
