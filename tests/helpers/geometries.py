"""Convolutions that hypothesis draws."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

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


def _pairs(most: int, least: int = 1) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


#: Convolutions of any geometry and layout, small enough for a loop over examples.
CONVOLUTIONS = st.builds(
    drawn_fisher_case,
    batch=st.integers(1, 5),
    groups=st.integers(1, 4),
    channels=st.integers(1, 36),
    filters=st.integers(1, 36),
    image=_pairs(13),
    kernel=_pairs(5),
    stride=_pairs(6),
    padding=_pairs(6, 0),
    dilation=_pairs(3),
    layouts=st.tuples(*2 * [st.sampled_from(["contiguous", "channels_last", "strided"])]),
)
