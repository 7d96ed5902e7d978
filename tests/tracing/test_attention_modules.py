"""nn.MultiheadAttention and what is built on it: their fused paths are read in their parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.tracing import trace
from tests.tracing.removal import faults


class Attending(nn.Module):
    """nn.MultiheadAttention between linear layers, of itself or of other widths."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        if widths:
            self.keys, self.values = (nn.Linear(5, width) for width in widths.values())

    def forward(self, x: Tensor) -> Tensor:
        q = self.enter(x)
        k, v = (self.keys(x), self.values(x)) if hasattr(self, "keys") else (q, q)
        return self.out(self.attention(q, k, v)[0])


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}], ids=str)
def test_multihead_attention_keeps_its_width(widths):
    model, inputs = Attending(**widths), torch.randn(2, 6, 5)
    channels = trace(model, inputs)
    assert not faults(model, inputs, channels)
    assert "whose own forward checks its width" in channels.skipped["enter"]
    others = {"keys", "values"} if widths else set()
    assert {group.name for group in channels.groups} == {"attention.out_proj"} | others


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
    assert [group.name for group in channels.groups] == [
        "1.layers.0.linear1", "1.layers.1.linear1",
    ]  # fmt: skip
    assert "whose own forward checks" in channels.skipped["0"]
