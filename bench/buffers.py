"""Flat buffers of random values, tensors carved out of them, and the floors that read them."""

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
class Buffers:
    """Lists of tensors that lie one after another in a buffer each: w and g, or y and dy."""

    lists: list[list[Tensor]]
    flat: list[Tensor]  # of float32 words

    @property
    def first(self) -> list[Tensor]:
        return self.lists[0]

    @property
    def second(self) -> list[Tensor]:
        return self.lists[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.lists for t in tensors)

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.first)

    def floors(self) -> list[Provider]:
        """Ways to read every byte once; the fastest in a run is its floor."""
        flat = self.flat
        compiled = peers.static(peers.product_sum)
        found = [Provider("floor: torch.sum", lambda: [t.sum() for t in flat], None, "floor")]
        if len(flat) == 2:
            dot = lambda: torch.dot(*flat)  # noqa: E731
            found.append(Provider("floor: torch.dot", dot, self._check_product, "floor"))
        if flat[0].device.type == "cpu":  # a GPU is held against its copy bandwidth besides
            product = lambda: compiled(*flat)  # noqa: E731
            found.append(Provider("floor: compiled dot", product, self._check_product, "floor"))
        return found

    def _check_product(self, got: Tensor) -> float:
        blocks = zip(*(t.split(2**22) for t in self.flat), strict=True)
        products = [peers.product([t.double() for t in block]) for block in blocks]
        value, scale = sum(p.sum() for p in products), sum(p.abs().sum() for p in products)
        error = float((got.double() - value).abs() / (EPS32 * scale))
        assert error < 1e4, f"off by {error:.0f} eps32 * sum of |terms|"  # it skipped some
        return error


def buffers(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scales: Sequence[float],
    channels_last: bool = False,
) -> Buffers:
    """Normal values of these standard deviations, in the tensors' shapes and memory order."""
    torch.manual_seed(0)
    step = _ALIGN // dtype.itemsize
    total = sum(-(-elements([shape]) // step) * step for shape in shapes)
    flats = [(torch.randn(total, device=device) * scale).to(dtype) for scale in scales]
    lists = [[*_carve(flat, shapes, step, channels_last)] for flat in flats]
    # A half buffer is read as float32: the same bytes, and no conversion to pay for.
    return Buffers(lists, [flat.view(torch.float32) for flat in flats])


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
