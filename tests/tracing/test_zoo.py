"""The small models that pruning is tested on: nothing wrong is offered, nothing is missing."""

from __future__ import annotations

import pytest

from taylor_kernels.tracing import trace
from tests.helpers import zoo
from tests.tracing.removal import faults

#: Layers that have to stay, by model; all others can lose channels.
STAYS = {
    "mlp": {"5"}, "vgg": {"head.2"}, "resnet": {"fc"}, "resnext": {"fc"}, "densenet": {"fc"},
    "mobilenet": {"fc"}, "unet": {"out"}, "unet_grouped": {"out"},
    "transformer": {"out"}, "two_inputs": {"heads.0", "heads.1"},
    "gated": {"down"}, "shared": {"leave"}, "odd": {"fc"},
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.ZOO)
def test_offered_units_can_go(name):
    model, inputs = zoo.build(name)
    assert not faults(model, inputs, trace(model, inputs))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_only_these_layers_stay(name):
    model, inputs = zoo.build(name)
    assert set(trace(model, inputs).skipped) == STAYS[name]
