"""Convolutions that hypothesis draws."""

from __future__ import annotations

from hypothesis import assume

from tests.helpers.fisher_cases import FisherCase

Pair = tuple[int, int]


def drawn_fisher_case(
    batch: int,
    groups: int,
    channels: int,
    filters: int,
    image: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    layouts: tuple[str, str],
) -> FisherCase:
    """Channels and filters of a group; a kernel that does not fit the image is drawn again."""
    assume(all(image[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    return FisherCase(
        "any",
        (batch, groups * channels, *image),
        (groups * filters, channels, *kernel),
        stride,
        padding,
        dilation,
        groups,
        *layouts,
    )
