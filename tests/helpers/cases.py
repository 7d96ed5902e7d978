"""Shapes, inputs and float64 references that the tests of every backend share.

References use plain PyTorch on the raw tensors, none of the package's code: a mistake in how the
package describes a layout shows here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
#: |got - ref64| <= C * eps32 * Σ|terms|. A term carries up to 5 roundings; the longest serial sum
#: of a kernel is a few dozen terms, whose roundings mostly cancel, then trees.
C = 16.0

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MomentsCase(NamedTuple):
    """One parameter: its shape, its groups, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    layout: str = "contiguous"  # or channels_last, misaligned, strided

    @property
    def dims(self) -> tuple[int | tuple[int, int], ...]:
        return (0,) if len(self.shape) == 1 else (0, 1, (0, 1))


class GateCase(NamedTuple):
    """One activation: its shape, which dim holds the channels, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    channel_dim: int = 1
    layout: str = "contiguous"  # or channels_last, misaligned, strided
    bias: bool = False


def filter_moments_cases() -> list[MomentsCase]:
    """Every kind of parameter, small and of odd extents, on both sides of the kernels' limits."""
    case = MomentsCase
    return [
        case("one_element", (1,)),
        case("vector", (37,)),
        case("vector_misaligned", (130,), layout="misaligned"),
        case("empty_rows", (0, 3)),
        case("empty_channels", (3, 0, 3, 3)),
        case("linear", (5, 19)),
        case("linear_aligned", (12, 256)),
        case("linear_misaligned", (7, 136), layout="misaligned"),
        case("linear_strided", (6, 33), layout="strided"),
        case("one_long_row", (1, 2501)),
        case("two_long_rows", (2, 1031)),
        case("many_short_rows", (203, 3)),
        case("rows_of_32", (65, 32)),
        case("rows_of_33", (65, 33)),
        case("one_column", (150, 1)),
        case("conv3x3", (13, 5, 3, 3)),
        case("conv3x3_misaligned", (6, 8, 3, 3), layout="misaligned"),
        case("conv3x3_channels_last", (10, 7, 3, 3), layout="channels_last"),
        case("conv1x1", (17, 24, 1, 1)),
        case("conv5x5", (9, 3, 5, 5)),
        case("conv5x5_channels_last", (4, 16, 5, 5), layout="channels_last"),
        case("conv1d", (6, 4, 7)),
        case("conv3d", (5, 3, 2, 3, 3)),
        case("conv3d_channels_last", (4, 6, 2, 3, 3), layout="channels_last"),
        case("depthwise3x3", (72, 1, 3, 3), groups=72),
        case("depthwise_multiplier", (24, 1, 3, 3), groups=12),
        case("grouped", (12, 5, 3, 3), groups=3),
        case("grouped_rows_are_groups", (6, 11, 3, 3), groups=6),
        case("grouped_channels_last", (8, 6, 3, 3), groups=2, layout="channels_last"),
        case("strided", (6, 7, 3, 3), layout="strided"),
    ]


def gate_cases() -> list[GateCase]:
    """Every kind of activation, small and of odd extents."""
    case = GateCase
    return [
        case("one_element", (1, 1)),
        case("linear", (5, 37)),
        case("linear_bias", (4, 64), bias=True),
        case("empty_batch", (0, 4, 3, 3)),
        case("empty_positions", (2, 4, 0, 3)),
        case("conv", (3, 5, 7, 9), bias=True),
        case("conv_1x1_map", (6, 20, 1, 1)),
        case("conv_aligned", (2, 4, 16, 16)),
        case("conv_misaligned", (2, 3, 8, 8), layout="misaligned", bias=True),
        case("conv_large_map", (1, 2, 71, 67)),
        case("conv_channels_last", (3, 12, 5, 7), layout="channels_last", bias=True),
        case("conv_channels_last_odd", (2, 7, 9, 9), layout="channels_last"),
        case("sequence", (3, 11, 24), channel_dim=2, bias=True),
        case("sequence_long", (1, 530, 13), channel_dim=2),
        case("heads", (2, 9, 4, 6), channel_dim=2),
        case("heads_last", (2, 9, 4, 6), channel_dim=-1),
        case("strided", (3, 6, 5, 4), layout="strided"),
        case("conv3d", (2, 3, 3, 4, 5)),
    ]


def lay_out(tensor: Tensor, layout: str, channel_dim: int = 1) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        last = tensor.movedim(channel_dim, -1).contiguous()
        return last.movedim(-1, channel_dim)
    if layout == "misaligned":  # one element past an aligned address
        base = tensor.new_empty(tensor.numel() + 1)
        return base[1:].view(tensor.shape).copy_(tensor)
    if layout == "strided":
        base = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
        return base[..., 1::2].copy_(tensor)
    return tensor.contiguous()


def random_like_case(
    case: MomentsCase | GateCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int | None = None,
    count: int = 2,
) -> tuple[Tensor, ...]:
    """Fresh tensors of a case: weight and gradient, or output and its gradient, or more."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    channel_dim = getattr(case, "channel_dim", 1)
    return tuple(
        lay_out(
            torch.randn(case.shape, generator=generator).to(device=device, dtype=dtype),
            case.layout,
            channel_dim,
        )
        for _ in range(count)
    )


def random_bias(
    case: GateCase, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor | None:
    """A bias for the cases that have one."""
    return torch.randn(case.shape[case.channel_dim]).to(device, dtype) if case.bias else None


def reference64(weight: Tensor, grad: Tensor, dim: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """[F, 5] float64 moments along one dim, and the bound Σ|terms| of each."""
    w, g = weight.double(), grad.double()
    gw = g * w
    return sums64((gw, gw * gw, gw.abs(), w * w, g * g), dim, groups)


def sums64(terms: Sequence[Tensor], dim: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """[F, sums] of terms shaped like a weight along one dim, and the bound Σ|terms| of each."""
    stacked = torch.stack(tuple(terms), dim=-1)
    if dim == 0:
        by_filter = stacked.reshape(len(stacked), math.prod(stacked.shape[1:-1]), len(terms))
    else:  # input channels of a grouped layer: group-major
        rows, channels = stacked.shape[:2]
        kernel = math.prod(stacked.shape[2:-1])
        shape = (groups, rows // groups, channels, kernel, len(terms))
        by_filter = stacked.reshape(shape).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return by_filter.sum(1), by_filter.abs().sum(1)


def gate_reference64(
    output: Tensor, grad_output: Tensor, bias: Tensor | None = None, channel_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """[N, C] float64 gate gradients, and the bound Σ|terms| of each."""
    y, dy = (t.double().movedim(channel_dim, 1) for t in (output, grad_output))
    shape = (y.size(0), y.size(1), math.prod(y.shape[2:]))
    y, dy = y.reshape(shape), dy.reshape(shape)
    if bias is not None:
        y = y - bias.double()[:, None]
    terms = y * dy
    return terms.sum(2), terms.abs().sum(2)


def assert_close(got: Tensor, ref: Tensor, bound: Tensor, c: float = C) -> None:
    """|got - ref| <= c * eps32 * bound everywhere; NaN and infinities in the same places."""
    assert got.shape == ref.shape, f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    got, ref, bound = got.double().cpu(), ref.cpu(), bound.cpu()
    finite = ref.isfinite()
    wrong = torch.where(
        finite,
        ~((got - ref).abs() <= c * EPS32 * bound),
        ~((got == ref) | (got.isnan() & ref.isnan())),
    )
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        units = ((got - ref).abs() / (EPS32 * bound))[wrong].max().item()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} entries are off, by up to {units:.1f} units of "
            f"eps32*bound (allowed {c}); first at {at}: "
            f"got {got[at].item()}, expected {ref[at].item()}"
        )


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors of one dtype, or two results not asked for, are the same."""
    if a is None or b is None:
        return a is b
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))
