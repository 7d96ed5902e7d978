"""conv2d_example_norms on a GPU: right values by every way, the same bits, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taylor_kernels.ops.example_norms import conv2d_example_norms, linear_example_norms
from tests.helpers import cases
from tests.helpers.example_norms import norms_reference64
from tests.helpers.fisher_cases import FisherCase, fisher_cases, random_fisher_inputs
from tests.helpers.fisher_limits import LIMIT_CASES
from tests.helpers.graphs import NEEDS_GPU, check_replay

pytestmark = NEEDS_GPU

CASES = [*fisher_cases(), *LIMIT_CASES]


def norms(x: Tensor, dy: Tensor, case: FisherCase, backend: str | None) -> Tensor:
    return conv2d_example_norms(x, case.size, dy, *case.geometry, backend=backend)


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda at: CASES[at].name)
def test_matches_float64_and_repeats(at: int, backend: str) -> None:
    case, dtype = CASES[at], cases.DTYPES[at % len(cases.DTYPES)]
    x, dy, _ = random_fisher_inputs(case, dtype, "cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for way in (backend, None):
            got = norms(x, dy, case, way)
            cases.assert_close(got, *norms_reference64(x, dy, case))
            assert cases.same_bits(got, norms(x, dy, case, way))


def test_graph_replay(backend: str) -> None:
    x, dy = torch.randn(4, 33, 40, device="cuda"), torch.randn(4, 33, 24, device="cuda")
    for way in (backend, None):
        check_replay(lambda way=way: [linear_example_norms(x, dy, backend=way)], (x, dy))
