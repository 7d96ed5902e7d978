"""filter_moments: five sums per filter over weights and their gradients, for a whole model at once.

For filter f with elements w_e and gradients g_e:

    moments[f] = ( Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g² )        (MOMENTS names them)

They are what the first-order Taylor criteria are made of: Molchanov et al., "Importance Estimation
for Neural Network Pruning" (CVPR 2019), eq. 8 is Σ(gw)² over the weights of a filter, and (Σgw)²
its joint form. Kernels: csrc/common/filter_moments.h, backends/triton/filter_moments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from taylor_kernels.backends import select
from taylor_kernels.ops._library import library
from taylor_kernels.ops._lists import empty_tables, parameters, tables

#: Names of the columns of a moments table.
MOMENTS = ("gw", "gw2", "abs_gw", "w2", "g2")


@overload
def filter_moments(
    weights: Tensor,
    grads: Tensor,
    *,
    dim: int = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor: ...
@overload
def filter_moments(
    weights: Tensor,
    grads: Tensor,
    *,
    dim: tuple[int, int],
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def filter_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    dim: int = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> list[Tensor]: ...
@overload
def filter_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    dim: tuple[int, int],
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]: ...
def filter_moments(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    *,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Moments of every filter of one parameter, or of a list of parameters in one launch.

    Args:
        weights: a tensor of 1 to 5 dimensions (float32, float16, bfloat16 or float64), or a
            sequence of such; any strides (contiguous and channels_last are read in place).
        grads: their gradients, each with its weight's shape, dtype and device.
        dim: 0 for output filters (F = size(0)), 1 for input channels (F = size(1) * groups),
            (0, 1) for both from one read. A transposed convolution stores its input channels
            first, so for it 0 means input channels and 1 output filters.
        groups: of a grouped convolution, an int or one per tensor. Used for dim 1: column
            j * size(1) + i is channel i of group j.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        [F, 5] float32 (float64 for float64 input), columns as in `MOMENTS`; for a sequence a list
        of such, views of one packed table per device; for dim=(0, 1) a pair (rows, columns).
        Bits do not depend on the rest of the list. Not differentiable: the result has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors.
        ValueError: shapes, dtypes or devices that do not match; lists of unequal length; a `dim`
            or `groups` that does not fit.
        RuntimeError: the named backend cannot run here.
    """

    def launch(
        places: Sequence[int], lists: list[list[Tensor]], groups: list[int], rows: bool, cols: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.taylor_kernels.filter_moments(*lists, groups, rows, cols, backend)

    return tables(launch, dim, groups, backend, weights, grads=grads)


def _run(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The op itself: two packed tables, empty where an axis was not asked for."""
    out = _empty(weights, grads, groups, rows, cols, backend)
    items = parameters(out, weights, grads, None, groups, rows, cols)
    kernels = select(weights[0].device, weights[0].dtype, backend)
    if items:
        kernels.filter_moments(items)
    return out


def _empty(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The outputs' shapes; also the fake kernel, by which torch.compile and export trace the op."""
    return empty_tables((len(MOMENTS),), weights, groups, rows, cols)


library.define(
    "filter_moments(Tensor[] weights, Tensor[] grads, int[] groups, bool rows, bool cols, "
    "str? backend) -> (Tensor, Tensor)"
)
library.impl("filter_moments", _run, "CPU")
library.impl("filter_moments", _run, "CUDA")
torch.library.register_fake("taylor_kernels::filter_moments", _empty, lib=library)
