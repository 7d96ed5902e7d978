"""Convolutions, inputs and float64 references that the tests of `conv2d_fisher` share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.cases import EPS32, C, lay_out

#: The same for conv2d_fisher in TF32: each factor is off by up to 2^-11 of itself, so g by 2^-10 of
#: Σ|terms| and g² by 2^-9 of its square, and a little.
TF32_C = C + 1.001 * 2**-9 / EPS32


class FisherCase(NamedTuple):
    """A 2-D convolution seen from its weight: its input, its geometry, how both sides lie."""

    name: str
    shape: tuple[int, int, int, int]  # of the input
    size: tuple[int, int, int, int]  # of the weight
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "contiguous"  # of the input: or channels_last, misaligned, strided
    grad_layout: str = "contiguous"

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def grad_shape(self) -> tuple[int, int, int, int]:
        extents = (
            (
                self.shape[2 + i]
                + 2 * self.padding[i]
                - self.dilation[i] * (self.size[2 + i] - 1)
                - 1
            )
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        height, width = extents
        return self.shape[0], self.size[0], height, width


def fisher_cases() -> list[FisherCase]:
    """Every kind of convolution, small and of odd extents; the linear layers are 1x1."""
    case, last = FisherCase, "channels_last"
    both = {"layout": last, "grad_layout": last}
    return [
        case("one_element", (1, 1, 1, 1), (1, 1, 1, 1)),
        case("empty_batch", (0, 3, 5, 5), (4, 3, 3, 3)),
        case("one_example", (1, 5, 6, 7), (7, 5, 3, 3), padding=(1, 1)),
        case("one_position", (6, 4, 3, 3), (9, 4, 3, 3)),
        case("one_pixel_padded", (5, 20, 1, 1), (19, 20, 3, 3), padding=(1, 1)),
        case("conv3x3", (3, 17, 9, 7), (13, 17, 3, 3), padding=(1, 1)),
        case("conv3x3_wide", (2, 40, 6, 5), (35, 40, 3, 3), padding=(1, 1)),
        case("conv3x3_channels_last", (2, 24, 7, 8), (18, 24, 3, 3), padding=(1, 1), **both),
        case("input_channels_last", (2, 7, 6, 5), (5, 7, 3, 3), padding=(0, 1), layout=last),
        case("grad_channels_last", (2, 7, 6, 5), (5, 7, 3, 3), grad_layout=last),
        case("conv1x1", (3, 33, 4, 5), (21, 33, 1, 1)),
        case("conv1x1_stride", (3, 18, 7, 7), (20, 18, 1, 1), (2, 2)),
        case("stem7x7", (2, 3, 23, 21), (16, 3, 7, 7), (2, 2), (3, 3)),
        case("stem_channels_last", (2, 3, 13, 14), (20, 3, 3, 3), (2, 2), (1, 1), **both),
        case("gray", (3, 1, 8, 8), (16, 1, 3, 3), padding=(1, 1)),
        case("uneven_geometry", (2, 6, 15, 12), (5, 6, 3, 2), (3, 2), (2, 1), (2, 3)),
        case("dilated", (2, 16, 11, 11), (16, 16, 3, 3), padding=(2, 2), dilation=(2, 2)),
        case("padding_beyond_kernel", (2, 3, 4, 4), (4, 3, 2, 2), padding=(5, 3)),
        case("stride_beyond_kernel", (2, 5, 17, 13), (6, 5, 2, 2), (5, 4)),
        case("columns_unread", (2, 4, 10, 10), (3, 4, 3, 3), (4, 4)),
        case("row_image", (3, 6, 1, 19), (8, 6, 1, 5), (1, 2), (0, 2)),
        case("depthwise", (3, 19, 9, 9), (19, 1, 3, 3), padding=(1, 1), groups=19),
        case(
            "depthwise_channels_last",
            (2, 24, 7, 7),
            (24, 1, 3, 3),
            (2, 2),
            (1, 1),
            groups=24,
            **both,
        ),
        case("depthwise_multiplier", (2, 6, 8, 8), (18, 1, 5, 5), padding=(2, 2), groups=6),
        case("grouped", (2, 12, 7, 7), (20, 3, 3, 3), padding=(1, 1), groups=4),
        case("grouped_wide", (2, 48, 5, 6), (40, 24, 3, 3), padding=(1, 1), groups=2),
        case(
            "grouped_channels_last", (2, 48, 5, 6), (16, 24, 3, 3), padding=(1, 1), groups=2, **both
        ),
        case("whole_vectors", (2, 32, 7, 6), (32, 32, 3, 3), (2, 1), (1, 2), **both),
        case("grouped_whole_vectors", (2, 64, 5, 6), (32, 32, 1, 1), groups=2, **both),
        case("tokens_in_whole_vectors", (2, 32, 300, 1), (16, 32, 1, 1), **both),
        case("resnext", (2, 64, 5, 5), (64, 4, 3, 3), padding=(1, 1), groups=16),
        case("tokens", (3, 37, 11, 1), (29, 37, 1, 1), **both),
        case("many_tokens", (2, 24, 131, 1), (33, 24, 1, 1), **both),
        case("no_tokens", (21, 50, 1, 1), (34, 50, 1, 1)),
        case("many_examples", (67, 3, 2, 2), (5, 3, 1, 1)),
        case("misaligned", (2, 8, 8, 8), (8, 8, 3, 3), padding=(1, 1), layout="misaligned"),
        case(
            "strided", (2, 5, 6, 6), (4, 5, 3, 3), (1, 1), (0, 0), (1, 1), 1, "strided", "strided"
        ),
    ]


def random_fisher_inputs(
    case: FisherCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh input, output gradient and float32 weight of a case."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    x, dy = (
        lay_out(torch.randn(shape, generator=generator).to(device=device, dtype=dtype), layout)
        for shape, layout in ((case.shape, case.layout), (case.grad_shape, case.grad_layout))
    )
    return x, dy, torch.randn(case.size, generator=generator).to(device)


def fisher_reference64(
    x: Tensor, dy: Tensor, case: FisherCase, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """float64 Σ_n g_n² in the weight's shape, or per filter with a weight; and its bound.

    The bound of g² is (Σ abs(terms of g))²: a sum that cancels keeps the rounding of its terms.
    """
    x, dy = x.double(), dy.double()
    if not x.size(0):
        nothing = x.new_zeros(case.size if weight is None else case.size[:1])
        return nothing, nothing
    n, groups = x.size(0), case.groups
    columns = F.unfold(x, case.size[2:], case.dilation, case.padding, case.stride)
    columns = columns.view(n, groups, -1, columns.size(2))
    rows = dy.reshape(n, groups, case.size[0] // groups, -1)
    found = []
    for a, b in ((rows, columns), (rows.abs(), columns.abs())):
        squares = torch.einsum("ngop,ngkp->ngok", a, b).square().sum(0)
        squares = squares.reshape(case.size)
        if weight is not None:
            squares = (squares * weight.double().square()).flatten(1).sum(1)
        found.append(squares)
    return found[0], found[1]
