"""Two flat buffers of random values, tensors carved out of them, and the floors that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import peers
from bench.harness import Provider
from bench.reference import EPS32
from bench.shapes import Shape, elements

# Every tensor starts at a multiple of 64 bytes, as those of an allocator do.
_ALIGN = 64


@dataclass
class Pair:
    """Lists of tensors that lie one after another in a buffer each: w and g, or y and dy."""

    first: list[Tensor]
    second: list[Tensor]
    flat: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.first, *self.second))

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.first)

    def floors(self) -> list[Provider]:
        """Three ways to read every byte once; the fastest in a run is its floor."""
        a, b = self.flat
        on_cpu = a.device.type == "cpu"  # a GPU is held against its copy bandwidth besides
        compiled = peers.static(peers.product_sum)

        def check(dot: Tensor) -> float:
            blocks = zip(a.split(2**22), b.split(2**22), strict=True)
            products = [x.double() * y.double() for x, y in blocks]
            value, scale = sum(p.sum() for p in products), sum(p.abs().sum() for p in products)
            error = float((dot.double() - value).abs() / (EPS32 * scale))
            assert error < 1e4, f"off by {error:.0f} eps32 * sum of |terms|"  # it skipped some
            return error

        return [
            Provider("floor: torch.dot", lambda: torch.dot(a, b), check, "floor"),
            Provider("floor: torch.sum", lambda: (a.sum(), b.sum()), None, "floor"),
            *([Provider("floor: compiled dot", lambda: compiled(a, b), check, "floor")] * on_cpu),
        ]


def pair(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scales: tuple[float, float],
    channels_last: bool = False,
) -> Pair:
    """Normal values of these standard deviations, in the tensors' shapes and memory order."""
    torch.manual_seed(0)
    step = _ALIGN // dtype.itemsize
    total = sum(-(-elements([shape]) // step) * step for shape in shapes)
    flats = [(torch.randn(total, device=device) * scale).to(dtype) for scale in scales]
    first, second = ([*_carve(flat, shapes, step, channels_last)] for flat in flats)
    # A half buffer is read as float32: the same bytes, and no conversion to pay for.
    words = flats[0].view(torch.float32), flats[1].view(torch.float32)
    return Pair(first, second, words)


def _carve(
    flat: Tensor, shapes: Sequence[Shape], step: int, channels_last: bool
) -> Sequence[Tensor]:
    tensors, at = [], 0
    for shape in shapes:
        count = elements([shape])
        part = flat[at : at + count]
        if channels_last:
            n, c, h, w = shape
            tensors.append(part.view(n, h, w, c).permute(0, 3, 1, 2))
        else:
            tensors.append(part.view(shape))
        at += -(-count // step) * step
    return tensors
