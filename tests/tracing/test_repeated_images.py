"""An image of one channel that code repeats to the width of what it is added to, as in V-Net."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.judging import check_all_but


class Stem(nn.Module):
    """A convolution, to each channel of which the image is added or multiplied."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.width, self.how = width, how
        self.conv = nn.Conv2d(1, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return HOW[self.how](self, x, self.conv(x)).relu()


HOW: dict[str, Callable[[Stem, Tensor, Tensor], Tensor]] = {
    "repeat": lambda s, x, y: y + x.repeat(1, s.width, 1, 1),
    "worked out": lambda s, x, y: x.repeat([1, s.width // x.size(1), 1, 1]) + y,
    "expand": lambda s, x, y: y * x.expand(-1, s.width, -1, -1),
    "in between": lambda s, x, y: y - x.tanh().expand(len(x), s.width, *x.shape[2:]).sigmoid(),
}


@pytest.mark.parametrize("how", HOW)
def test_as_often_as_channels_are_left(how):
    width = random.Random(how).randint(5, 12)
    model = nn.Sequential(Stem(width, how), nn.Conv2d(width, 2, 1))
    check_all_but(["1"], model, torch.randn(1, 1, 6, 6))
    assert model[0].width == model[0].conv.out_channels < width
