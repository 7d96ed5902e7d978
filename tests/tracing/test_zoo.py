"""The small models that pruning is tested on: nothing wrong is offered, nothing is missing."""

from __future__ import annotations

import pytest

from taylor_kernels.tracing import trace
from tests.helpers import zoo
from tests.helpers.samples import some
from tests.tracing.removal import faults

pytestmark = pytest.mark.long

#: Layers that have to stay, by model; all others can lose channels.
STAYS = {
    "mlp": {"5"}, "vgg": {"head.2"}, "resnet": {"fc"}, "resnext": {"fc"}, "densenet": {"fc"},
    "mobilenet": {"fc"}, "unet": {"out"}, "unet_grouped": {"out"},
    "transformer": {"out"}, "two_inputs": {"heads.0", "heads.1"},
    "gated": {"down"}, "shared": {"leave"}, "odd": {"fc"},
}  # fmt: skip


#: Those of which this run tries each unit by itself; of others' groups three, and sets of units.
EVERY = some([*zoo.ZOO], len(zoo.ZOO) // 3)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_offered_units_can_go(name):
    model, inputs = zoo.build(name)
    assert not faults(model, inputs, trace(model, inputs), every=name in EVERY)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_only_these_layers_stay(name):
    model, inputs = zoo.build(name)
    assert set(trace(model, inputs).skipped) == STAYS[name]
