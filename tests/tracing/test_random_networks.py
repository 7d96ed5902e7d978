"""Networks drawn from pieces: masking a unit is removing it, and its label is on just what moves.

Each run draws some; `python -m tools.random_networks` keeps a record of thousands.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from taylor_kernels.tracing import trace
from tests.helpers.samples import draws
from tests.tracing.moving import faults_of_labels
from tests.tracing.pieces import ACROSS, HEADS, KINDS, network
from tests.tracing.removal import faults

pytestmark = pytest.mark.long

EVERY = list(HealthCheck)
SEEDS = st.integers(0, 2**20)


def pieces(kinds: Sequence[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(kinds), max_size=4)


@settings(max_examples=draws(14), suppress_health_check=EVERY)
@given(kinds=pieces(KINDS), last=st.sampled_from(HEADS), seed=SEEDS)
def test_masking_a_unit_is_removing_it(kinds, last, seed):
    model = network(kinds, last, seed)
    inputs = torch.randn(2, 3, 4, 4)
    assert not faults(model, inputs, trace(model, inputs), draws=2, every=False)


#: Pieces in which a channel is met by others in a product with a weight, or not at all. A statistic
#: of all channels moves with each of them, and is no label.
LABELLED = tuple(k for k in KINDS if k not in {*ACROSS, "group_norm", "normalised", "summed"})


@settings(max_examples=draws(6), suppress_health_check=EVERY)
@given(kinds=pieces(LABELLED), last=st.sampled_from(HEADS), seed=SEEDS)
def test_what_moves_is_just_what_carries_the_label(kinds, last, seed):
    model = network(kinds, last, seed)
    inputs = torch.randn(2, 3, 4, 4)
    assert not faults_of_labels(model, inputs, trace(model, inputs), seed)


def test_a_label_on_what_does_not_move_is_seen():
    model, inputs = network(["activation", "grouped"], "mean", 1), torch.randn(2, 3, 4, 4)
    channels = trace(model, inputs)
    read, made = channels.layers["2"]
    channels.layers["2"] = read.roll(1), made
    assert faults_of_labels(model, inputs, channels, 1)


#: Pieces without a product over channels: a channel stays a channel.
MOVES = (
    "activation", "pool", "halves", "twice", "shuffle", "native_shuffle", "depthwise", "prelu",
    "pixel_shuffle", "pixel_unshuffle", "maxout", "glu", "scale", "instance_norm",
    "softmax", "every_other", "stacked", "flipped", "rescaled",
)  # fmt: skip


@settings(max_examples=draws(12), suppress_health_check=EVERY)
@given(kinds=pieces(MOVES), seed=SEEDS)
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
