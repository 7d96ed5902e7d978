"""Networks as programs that run where only PyTorch is."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from taylor_kernels.studies.data import IMAGE_SHAPE


def export(model: nn.Module, file: Path) -> dict[str, float]:
    """Write the model in eval mode as a torch.export program whose batch is dynamic.

    `torch.export.load(file).module()(images)` then runs where neither the model's class nor this
    package is.

    Returns:
        bytes: size of the file; max_abs_difference: of its logits, loaded back, on random images.
    """
    model = copy.deepcopy(model).cpu().eval()
    # Two examples: with one, the batch would be taken for a constant.
    example = _noise(2, seed=0)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
        torch.export.save(program, file)
        probe = _noise(5, seed=1)
        difference = torch.export.load(file).module()(probe) - model(probe)
    return {"bytes": file.stat().st_size, "max_abs_difference": difference.abs().max().item()}


def _noise(images: int, seed: int) -> torch.Tensor:
    return torch.randn(images, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(seed))
