"""Networks as files: cached weights, and programs that run where only PyTorch is."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from taylor_kernels.studies.pruning.data import IMAGE_SHAPE


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the model's state as safetensors, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, part)
    os.replace(part, file)


def load_weights(model: nn.Module, file: Path) -> bool:
    """Load what `save_weights` wrote; False if there is no such file.

    Raises:
        ValueError: the file is damaged or of another model.
    """
    if not file.exists():
        return False
    try:
        model.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError, OSError):
        raise ValueError(f"{file} is damaged or of another network") from None
    return True


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
