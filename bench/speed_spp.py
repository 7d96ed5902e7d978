"""Convolutions of ResNets' widths without columns, and without channels, beside dense ones.

`python -m bench.methods spp --speed` keeps what this measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taylor_kernels.methods import lower_columns
from taylor_kernels.studies.results import Json
from taylor_kernels.studies.training import latencies


def measure() -> Json:
    """3×3 convolutions of ResNets' widths, dense, without columns and without channels."""
    torch.manual_seed(0)
    shapes = [(64, 56), (128, 28), (256, 14), (512, 7)]
    rows: list[Json] = []
    for width, side in shapes:
        images = torch.randn(4, width, side, side)
        models: dict[str, nn.Module] = {"dense": nn.Sequential(_conv(width, width))}
        for part in (2, 4):
            conv = _conv(width, width)
            with torch.no_grad():
                weight = conv.weight
                gone = torch.randperm(weight[0].numel())[: weight[0].numel() * (part - 1) // part]
                weight.flatten(1)[:, gone] = 0
            lowered = nn.Sequential(conv)
            lower_columns(lowered)
            models[f"columns {part}×"] = lowered
            models[f"channels {part}×"] = _Narrow(width // part, width)
        times = latencies(models, images, repeats=15)
        milliseconds = {name: quartiles["median"] for name, quartiles in times.items()}
        rows.append({"width": width, "side": side, "milliseconds": milliseconds})
    return {"words": words(rows), "layers": rows}


def words(layers: Sequence[Json]) -> str:
    """For the table over all methods."""
    times = [each["milliseconds"] for each in layers]
    found = []
    for kind in ("columns 4×", "channels 4×"):
        ratios = [each["dense"] / each[kind] for each in times]
        found.append(f"{min(ratios):.1f}–{max(ratios):.1f}×")
    return f"layers with 1/4 of the columns {found[0]} as fast as dense, of the channels {found[1]}"


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class _Narrow(nn.Module):
    """What a convolution is whose other input channels were removed where they are made."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.conv = inputs, _conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, : self.inputs].contiguous())
