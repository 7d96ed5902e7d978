"""conv2d_example_norms in CUDA on a CPU: see emulated.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylor_kernels.layout import conv2d_fisher_args
from tests.helpers import emulated
from tests.helpers.cases import DTYPES, assert_close, same_bits
from tests.helpers.example_norms import norms_reference64
from tests.helpers.fisher_cases import TF32_C, FisherCase, fisher_cases, random_fisher_inputs
from tests.helpers.fisher_limits import LIMIT_CASES

#: The op answers for the empty. Half of the limits, whose loads conv2d_fisher's tests see.
CASES = [case for case in (*fisher_cases(), *LIMIT_CASES[::2]) if 0 not in case.shape]


def norms(x: Tensor, dy: Tensor, case: FisherCase, tf32: bool = False) -> Tensor:
    out = torch.full(case.shape[:1], float("nan"))
    args = conv2d_fisher_args(x, dy, None, case.size, *case.geometry, tf32, out)
    emulated.run("conv2d_example_norms", args)
    return out


@pytest.mark.sample(len(CASES) // 2, covering=False)
@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda at: CASES[at].name)
def test_matches_float64_and_repeats(at: int) -> None:
    case = CASES[at]
    x, dy, _ = random_fisher_inputs(case, DTYPES[at % len(DTYPES)])
    got = norms(x, dy, case)
    assert_close(got, *norms_reference64(x, dy, case))
    assert same_bits(got, norms(x, dy, case))


@pytest.mark.parametrize("case", LIMIT_CASES[1::2], ids=lambda case: case.name)
def test_tf32_rounds_factors(case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    assert_close(norms(x, dy, case, tf32=True), *norms_reference64(x, dy, case), c=TF32_C)


@pytest.mark.parametrize("groups", [1, 2, 12])
def test_non_finite_values_stay_in_their_example(groups: int) -> None:
    case = FisherCase("bad", (4, 12, 6, 6), (12, 12 // groups, 3, 3), padding=(1, 1), groups=groups)
    x, dy, _ = random_fisher_inputs(case, torch.bfloat16)
    dy[1, 3, 2, 3] = float("inf")
    x[3, 7, 3, 2] = float("nan")
    assert norms(x, dy, case).isfinite().tolist() == [True, False, True, False]
