"""global_threshold.cu and sparse_momentum.cu on a CPU: see emulated.py."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import emulated, list_steps
from tests.helpers.cases import DTYPES


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["float32", "mixed"])
def test_the_table_and_the_step_have_the_references_bits(dtypes, ties):
    weights, grads, momenta = list_steps.lists(dtypes, ties)
    for factors, signed in ((grads, False), (None, False), (None, True)):
        for count in list_steps.COUNTS:
            expected, found = (
                list_steps.threshold(run, weights, factors, count, signed)
                for run in (list_steps.by_reference, emulated.run)
            )
            assert found.equal(expected), (count, signed)
    for rows in (False, True):
        table = list_steps.threshold(
            list_steps.by_reference, weights, None if rows else grads, 900, False
        )
        both = [
            list_steps.stepped(run, weights, grads, momenta, table, rows)
            for run in (list_steps.by_reference, emulated.run)
        ]
        assert all(a.equal(b) for a, b in zip(*both, strict=True))


def test_more_tensors_than_one_launch_takes_with_ties_over_all():
    """The last of the equal scores lies in the second launch's table."""
    sizes = [1 + i % 3 for i in range(900)]
    tensors = [torch.ones(n) for n in sizes]
    from taylor_kernels.layout import GlobalThresholdArgs
    from taylor_kernels.ops.global_threshold import threshold_items

    for count in (1600, sum(sizes)):
        table = torch.full((3,), -7)
        items = threshold_items(tensors, None, [True] * len(sizes))
        emulated.run("global_threshold", GlobalThresholdArgs(table, items, count, False))
        last = count - 1 if count < sum(sizes) else torch.iinfo(torch.int64).max
        assert table.tolist() == [0x3F800000, last, 0]


def test_what_is_not_finite_is_found_and_stops_the_step():
    weights, grads, momenta = list_steps.lists(DTYPES[:1], False)
    grads[2][0], grads[3][-1] = torch.inf, torch.nan
    table = list_steps.threshold(emulated.run, weights, grads, 900, False)
    assert int(table[2]) == len(weights) - 2
    after = list_steps.stepped(emulated.run, weights, grads, momenta, table, False)
    assert all(a.equal(b) for a, b in zip(after, weights + momenta, strict=True))
