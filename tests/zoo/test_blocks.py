"""Blocks of transformers' own models: masked is removed, and the costs are what is left."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from taylor_kernels.pruning import Pruner
from taylor_kernels.tracing.run.running import call, tensors_in
from tests.zoo import language

#: How many attention and feed-forward branches, or blocks of convolutions, there are.
BLOCKS = {
    "llama": 4, "gpt2": 4, "bert": 4, "vit": 4, "swin": 4, "convnext": 4, "hf_resnet": 3,
    "whisper": 5,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.sample(4, covering=False)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers_models(name):
    pytest.importorskip("transformers", reason="its models are what is pruned here")
    torch.manual_seed(0)
    model, inputs = getattr(language, name)()
    model = model.double()
    inputs = tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, inputs
    )

    def outputs() -> list[torch.Tensor]:
        return [t for t in tensors_in(call(model, inputs)) if t.requires_grad]

    # Swin's windows come in dim 0, and gates of its stream see them as examples of their own.
    criterion = "taylor_fo_bn" if name == "swin" else "taylor_fo_gate"
    pruner = Pruner(model, inputs, criterion, blocks=True, params=0.3, every=1, per_step=0.2)
    assert len(pruner.blocks) == BLOCKS[name]
    for _ in range(30):
        model.zero_grad()
        sum(output.square().mean() for output in outputs()).backward()
        if pruner.step().blocks:
            break
    assert len(pruner.blocks) < BLOCKS[name]
    model.eval()
    expected, cost = outputs(), pruner.cost
    with pytest.warns(UserWarning, match="new parameters"):
        pruner.compact()
    torch.testing.assert_close(outputs(), expected, rtol=0, atol=1e-10)
    assert sum(p.numel() for p in model.parameters()) == cost.params
