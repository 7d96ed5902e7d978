"""Pruned language models write on with their caches of keys and values as they do without."""

from __future__ import annotations

import pytest
import torch

import taylor_kernels as tk

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("network", "outputs"),
    [("phi3", None), ("gpt_bigcode", None), ("t5", ("logits",))],
    indirect=["network"],
)
def test_a_cache_serves_what_is_left(network, outputs):
    model, inputs = network.built()
    pruner = tk.Pruner(
        model, inputs, "magnitude_l2", params=0.7, every=1, per_step=0.2, outputs=outputs
    )
    while not pruner.done:
        pruner.step()
    pruner.compact().eval()
    found = [
        model.generate(
            inputs["input_ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False,
            use_cache=cached, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
