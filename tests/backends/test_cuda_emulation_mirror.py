"""mirror_step.cu on a CPU: see emulated.py. tests/gpu runs it on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from taylor_kernels.ops import mirror_step as op
from taylor_kernels.ops.mirror_step import MirrorRule
from tests.helpers import emulated, mirror
from tests.helpers.cases import DTYPES, lay_out, same_bits

RULES = mirror.RULES_OF_TESTS


@pytest.fixture(autouse=True)
def _kernels_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.kernels()
    monkeypatch.setattr(op, "kernel", lambda *_: partial(emulated.run, "mirror_step"))


@pytest.mark.sample(len(RULES) // 2, covering=False)
@pytest.mark.parametrize("at", range(len(RULES)), ids=lambda at: mirror.label(RULES[at]))
def test_a_step_is_that_of_float64(at: int) -> None:
    rule, dtype = RULES[at], DTYPES[at % len(DTYPES)]
    each = [mirror.random_tensors(rule, shape, dtype) for shape in ((4, 8), (3, 5), (1031,))]
    before = [tensors.copies() for tensors in each]
    mirror.run([rule] * len(each), each)
    for old, new in zip(before, each, strict=True):
        mirror.check(rule, old, new)
    if rule.planes:
        mirror.check_projections(rule, each, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_many_rules_chunks_and_addresses_has_the_bits_of_each_alone(
    dtype: torch.dtype,
) -> None:
    shapes = [(16_384,), (16_385,), (5, 3), (40, 820)]
    tasks = [(rule, shapes[i % 4]) for i, rule in enumerate(RULES)]
    tasks += [(MirrorRule("tanh", rate=0.1), (3,))] * 300  # more than one launch holds
    each = [mirror.random_tensors(rule, shape, dtype) for rule, shape in tasks]
    moved = [
        tensors.copies()._replace(param=lay_out(tensors.param, "misaligned")) for tensors in each
    ]
    mirror.run([rule for rule, _ in tasks], each)
    for (rule, _), tensors, other in list(zip(tasks, each, moved, strict=True))[:60:3]:
        mirror.run([rule], [other])
        for one, two in zip(tensors, other, strict=True):
            if one is not None:
                assert same_bits(one, two.contiguous()), mirror.label(rule)
