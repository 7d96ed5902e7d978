"""The example that prunes a language model does what it says, and what it saves is that model."""

from __future__ import annotations

import runpy

import pytest
import torch

import taylor_kernels as tk
from tests.helpers import ROOT

pytestmark = pytest.mark.long


def test_it_prunes_feed_forward_and_heads_and_learns_on(tmp_path, monkeypatch, one_thread):
    pytest.importorskip("transformers", reason="the example prunes a Llama of transformers")
    pytest.importorskip("safetensors", reason="pruned models are files of safetensors")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "examples/prune_language_model.py"), run_name="__main__")
    model, pruner, config = names["model"], names["pruner"], names["config"]
    whole = type(model)(config)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, whole)]
    assert sizes[0] <= 0.7 * sizes[1]
    gone = {name.split(".")[-2] for record in pruner.history for name in record.removed}
    assert "mlp" in gone
    assert names["recovered"] < names["pruned"] < 60  # of 256 bytes that there are
    again = tk.load_pruned(whole, "pruned.safetensors").eval()
    text = names["held_out"][:2]
    with torch.no_grad():
        assert torch.equal(again(input_ids=text).logits, model.eval()(input_ids=text).logits)
