"""nn.MultiheadAttention and what is built on it: their fused paths are read in their parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taylor_kernels.tracing import trace


@pytest.mark.parametrize("first", [True, False])
def test_a_transformer_layer_in_eval_mode_is_read_in_its_parts(first):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=first)
    model = nn.Sequential(
        nn.Linear(5, 8),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(8, 3),
    ).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    channels = trace(model, torch.randn(2, 6, 5))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert {group.name: group.size for group in channels.groups} == {
        "0": 8, "1.layers.0.self_attn.in_proj_weight": 2, "1.layers.0.linear1": 12,
        "1.layers.1.self_attn.in_proj_weight": 2, "1.layers.1.linear1": 12,
    }  # fmt: skip
