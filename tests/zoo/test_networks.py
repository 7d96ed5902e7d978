"""Networks that people bring: as much can be pruned as the table says, and what is pruned is right.

The table is in networks.py; docs/networks.md tells of the same networks at their own sizes, but for
those that are no part of it.
"""

from __future__ import annotations

import pytest

from tests.zoo import judging
from tests.zoo.networks import NETWORKS, OTHERS

pytestmark = pytest.mark.long

#: Language models are small here. Of the others, which take seconds each, a run draws half.
LARGE = [name for name, network in NETWORKS.items() if network.package != "transformers"]
HALF = pytest.mark.sample(len(LARGE) // 2, covering=False)


@pytest.mark.parametrize(
    "network",
    [pytest.param(name, marks=[HALF] if name in LARGE else []) for name in [*NETWORKS, *OTHERS]],
    indirect=True,
)
def test_it_is_pruned_to_the_target_and_trains_on(network):
    model, inputs = network.built()
    pruner, optimizer = judging.new_pruner(model, inputs, network.params, read=network.outputs)
    verdict = judging.prune(model, inputs, pruner, optimizer, network.outputs)
    assert verdict.prunable >= network.least, verdict.reasons
    assert verdict.reached
    assert verdict.left <= network.params
    assert verdict.error < 1e-6
