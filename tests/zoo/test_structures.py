"""One structure each: just the layers named have to stay, and what is pruned is right."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import judging
from tests.zoo.structures import STRUCTURES
from tests.zoo.structures_of_images import IMAGES
from tests.zoo.structures_of_tokens import TOKENS

EVERY = {**STRUCTURES, **IMAGES, **TOKENS}


@pytest.mark.parametrize("name", EVERY)
def test_only_the_layers_named_stay(name):
    structure = EVERY[name]
    torch.manual_seed(0)
    model, inputs = structure.build(), structure.inputs()
    pruner, optimizer = judging.new_pruner(model, inputs, structure.params, structure.criterion)
    assert set(judging.layers(model)) - set(pruner.widths) == structure.stays, pruner.skipped
    verdict = judging.prune(model, inputs, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
