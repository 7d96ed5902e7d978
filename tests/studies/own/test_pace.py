"""The way to a target is spread over the prunings that there are, and ends at the last of them."""

from __future__ import annotations

import pytest

from taylor_kernels.pruning import Pruner
from taylor_kernels.studies.own.pace import Pace
from tests.helpers import zoo

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("targets", [{"flops": 0.4}, {"params": 0.5}, {"filters": 0.6},
                                     {"flops": 0.8, "params": 0.45}])  # fmt: skip
@pytest.mark.parametrize("prunings", [1, 3, 8])
def test_targets_are_met_at_the_last_pruning(targets, prunings):
    model, inputs = zoo.build("resnet")
    pruner = Pruner(model, inputs, "magnitude_l2", every=2, verify=False, **targets)
    pace = Pace(pruner, prunings)
    steps = 0
    while not pruner.done:
        pace.set()
        pruner.step()
        steps += 1
        assert steps <= 2 * prunings
    taken = [sum(map(len, record.removed.values())) for record in pruner.history]
    # Filters differ in what they cost, so the last pruning may take more or fewer.
    assert len(taken) >= max(1, prunings - 2)
    assert max(taken) <= max(4 * sum(taken) / prunings, sum(taken) / prunings + 12)


def test_per_step_can_be_set_between_prunings():
    model, inputs = zoo.build("vgg")
    pruner = Pruner(model, inputs, "magnitude_l2", every=1, per_step=1, filters=0.5)
    assert pruner.per_step == 1
    pruner.step()
    pruner.per_step = 4
    record = pruner.step()
    assert sum(map(len, record.removed.values())) == 4
    for wrong in (0, 0.5, True, "2"):
        with pytest.raises(ValueError, match=r"^per_step: expected an integer of at least 1"):
            pruner.per_step = wrong
    assert pruner.per_step == 4
