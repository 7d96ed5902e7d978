"""second_order_moments: two sums per filter over weights, gradients and a Hessian's product.

For filter f with elements w_e, gradients g_e and (Hv)_e, a product of the Hessian and a vector:

    moments[f] = ( (Σ q)², Σ q² ),   q = g·w − ½·w·(Hv)

With v = w, −Σ q over all weights is how the loss changes, to second order, as they go to zero, and
q_e is the share of one. Its square is the second-order importance of Molchanov et al., "Importance
Estimation for Neural Network Pruning" (CVPR 2019); (Σ q)² takes a filter as a group of weights, as
(Σ gw)² does to first order. v may as well be other than w, such as the weights of one layer with
zeros elsewhere. Kernels: csrc/common/second_order_moments.h,
backends/triton/second_order_moments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from taylor_kernels.backends import select
from taylor_kernels.ops._library import library
from taylor_kernels.ops._lists import empty_tables, parameters, tables

#: Columns of the table.
COLUMNS = 2


@overload
def second_order_moments(
    weights: Tensor,
    grads: Tensor,
    hvps: Tensor,
    *,
    dim: int = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor: ...
@overload
def second_order_moments(
    weights: Tensor,
    grads: Tensor,
    hvps: Tensor,
    *,
    dim: tuple[int, int],
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def second_order_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    *,
    dim: int = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> list[Tensor]: ...
@overload
def second_order_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    *,
    dim: tuple[int, int],
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]: ...
def second_order_moments(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    *,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """((Σ q)², Σ q²), q = g·w − ½·w·(Hv), of every filter of a parameter or of a list of them.

    Args:
        weights: a tensor of 1 to 5 dimensions (float32, float16, bfloat16 or float64), or a
            sequence of such; any strides (contiguous and channels_last are read in place).
        grads: their gradients, each with its weight's shape, dtype and device.
        hvps: the products Hv, likewise; for Taylor scores v = w, as in
            `torch.autograd.grad(grads, weights, grad_outputs=weights)`.
        dim, groups, backend: as those of `filter_moments`.

    Returns:
        [F, 2] float32 (float64 for float64 input); lists and pairs as `filter_moments` returns
        them. Not differentiable: the result has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors.
        ValueError: shapes, dtypes or devices that do not match; lists of unequal length; a `dim`
            or `groups` that does not fit.
        RuntimeError: the named backend cannot run here.
    """
    return _tables(weights, grads, hvps, dim, groups, backend, squared=True)


def second_order_sums(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    *,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Any:
    """(Σ q, Σ q²), otherwise as `second_order_moments`: sums that add up over coupled filters."""
    return _tables(weights, grads, hvps, dim, groups, backend, squared=False)


def _tables(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    dim: int | tuple[int, int],
    groups: int | Sequence[int],
    backend: str | None,
    *,
    squared: bool,
) -> Any:
    def launch(
        places: Sequence[int], lists: list[list[Tensor]], groups: list[int], rows: bool, cols: bool
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.taylor_kernels.second_order_moments
        packed = op(*lists, groups, rows, cols, backend)
        if squared:
            for table in packed:
                table[:, 0].square_()
        return packed

    return tables(launch, dim, groups, backend, weights, grads=grads, hvps=hvps)


def _run(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The op itself: two packed tables of (Σ q, Σ q²), empty where an axis was not asked for."""
    out = _empty(weights, grads, hvps, groups, rows, cols, backend)
    items = parameters(out, weights, grads, hvps, groups, rows, cols)
    kernels = select(weights[0].device, weights[0].dtype, backend)
    if items:
        kernels.second_order_moments(items)
    return out


def _empty(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The outputs' shapes; also the fake kernel."""
    return empty_tables((COLUMNS,), weights, groups, rows, cols)


library.define(
    "second_order_moments(Tensor[] weights, Tensor[] grads, Tensor[] hvps, int[] groups, "
    "bool rows, bool cols, str? backend) -> (Tensor, Tensor)"
)
library.impl("second_order_moments", _run, "CPU")
library.impl("second_order_moments", _run, "CUDA")
torch.library.register_fake("taylor_kernels::second_order_moments", _empty, lib=library)
