"""mirror_step on a GPU: the CUDA and the Triton kernels against float64."""

from __future__ import annotations

import pytest

import taylor_kernels as tk
from tests.helpers import mirror
from tests.helpers.cases import DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("rule", mirror.RULES_OF_TESTS, ids=mirror.label)
def test_a_step_is_that_of_float64(rule, backend) -> None:
    if not tk.available_backends()[backend]:
        pytest.skip(str(tk.available_backends()[backend]))
    for dtype in DTYPES:
        each = [
            mirror.random_tensors(rule, shape, dtype) for shape in ((3, 5), (1031,), (64, 1024))
        ]
        before = [tensors.copies() for tensors in each]
        on_gpu = [
            mirror.Tensors(*(None if t is None else t.cuda() for t in tensors)) for tensors in each
        ]
        mirror.run([rule] * len(each), on_gpu, backend)
        for old, new in zip(before, on_gpu, strict=True):
            back = mirror.Tensors(*(None if t is None else t.cpu() for t in new))
            mirror.check(rule, old, back)
