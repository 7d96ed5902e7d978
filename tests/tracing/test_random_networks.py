"""Networks drawn from pieces: every unit that is offered can go, and masking it is removing it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pieces import HEADS, KINDS, network
from removal import faults

from taylor_kernels.tracing import trace


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=4),
    last=st.sampled_from(HEADS),
    seed=st.integers(0, 2**20),
)
def test_masking_a_unit_is_removing_it(kinds, last, seed):
    model = network(kinds, last, seed)
    inputs = torch.randn(2, 3, 4, 4)
    assert not faults(model, inputs, trace(model, inputs), draws=2, every=False)
