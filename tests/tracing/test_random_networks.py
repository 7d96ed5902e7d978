"""Networks drawn from pieces: every unit that is offered can go, and masking it is removing it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from taylor_kernels.tracing import trace
from tests.tracing.pieces import HEADS, KINDS, network
from tests.tracing.removal import faults

pytestmark = pytest.mark.long


@settings(max_examples=14, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=4),
    last=st.sampled_from(HEADS),
    seed=st.integers(0, 2**20),
)
def test_masking_a_unit_is_removing_it(kinds, last, seed):
    model = network(kinds, last, seed)
    inputs = torch.randn(2, 3, 4, 4)
    assert not faults(model, inputs, trace(model, inputs), draws=2, every=False)


#: Pieces without a product over channels: a channel stays a channel.
MOVES = (
    "activation", "pool", "halves", "twice", "shuffle", "native_shuffle", "depthwise", "prelu",
    "pixel_shuffle", "pixel_unshuffle", "maxout", "glu", "scale", "instance_norm",
    "softmax", "every_other", "stacked", "flipped", "rescaled",
)  # fmt: skip


@settings(max_examples=14, suppress_health_check=list(HealthCheck))
@given(kinds=st.lists(st.sampled_from(MOVES), max_size=4), seed=st.integers(0, 2**20))
def test_what_moves_with_a_channel_goes_with_it(kinds, seed):
    model = network(kinds, "conv", seed, widest=1000).double().eval()
    # Where a piece does not fit the width, a convolution stands in for it.
    assume(not any(isinstance(part, nn.Conv2d) and part.groups == 1 for part in model[1:-1]))
    inputs = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    channels = trace(model, inputs)
    body, last = model[:-1], str(len(model) - 1)
    (_, made), (read, _) = channels.layers["0"], channels.layers[last]
    # A depthwise convolution of several filters per channel makes channels of its own.
    own = {int(c) for name in channels.layers.keys() - {"0"} for c in channels.layers[name][1]}
    own -= set(made.tolist())
    with torch.no_grad():
        before = body(inputs)
        for channel, number in enumerate(made.tolist()):
            weight = model[0].weight[channel]
            kept = weight.clone()
            weight.add_(torch.randn_like(weight))
            moved = (body(inputs) != before).any(dim=3).any(dim=2)[0]
            weight.copy_(kept)
            if channels.reason(number) is None:
                assert set(read[moved].tolist()) <= {number}
            else:
                others = set(read[moved].tolist()) - own
                assert all(channels.reason(other) for other in others)
