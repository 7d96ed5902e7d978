"""filter_moments: five sums per filter over weights and their gradients, for a whole model at once.

For filter f with elements w_e and gradients g_e:

    moments[f] = ( Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g² )        (MOMENTS names them)

They are what the first-order Taylor criteria are made of: Molchanov et al., "Importance Estimation
for Neural Network Pruning" (CVPR 2019), eq. 8 is Σ(gw)² over the weights of a filter, and (Σgw)²
its joint form. Kernels: csrc/filter_moments.h, backends/triton/filter_moments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, select
from taylor_kernels.layout import accumulator, parameter_item
from taylor_kernels.ops._checks import check_like, check_tensor, is_pair
from taylor_kernels.ops._library import library

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
        backend: one of `taylor_kernels.backends()`; None picks by device.

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
    if isinstance(weights, Tensor):
        if not isinstance(grads, Tensor):
            raise TypeError(
                f"grads: expected a torch.Tensor like weights, got {type(grads).__name__}"
            )
        table = _moments([weights], [grads], dim, groups, backend, ("weights", "grads"))
        return (table[0][0], table[1][0]) if len(table) == 2 else table[0][0]
    if isinstance(grads, Tensor):
        raise TypeError(
            "grads: got one tensor for a sequence of weights; pass a sequence of gradients"
        )
    for name, value in (("weights", weights), ("grads", grads)):
        if not isinstance(value, Sequence):
            raise TypeError(
                f"{name}: expected a tensor or a sequence of tensors, got {type(value).__name__}"
            )
    weights, grads = list(weights), list(grads)
    if len(weights) != len(grads):
        raise ValueError(
            f"grads: {len(grads)} gradients for {len(weights)} weights; pass one for each"
        )
    tables = _moments(weights, grads, dim, groups, backend, ("weights[{}]", "grads[{}]"))
    return (tables[0], tables[1]) if len(tables) == 2 else tables[0]


def _moments(
    weights: list[Tensor],
    grads: list[Tensor],
    dim: int | tuple[int, int],
    groups: int | Sequence[int],
    backend: str | None,
    names: tuple[str, str],
) -> list[list[Tensor]]:
    """One list of tables per axis asked for."""
    check_name(backend)
    axes = _axes(dim)
    each_groups = _each_groups(groups, len(weights))
    for i, (weight, grad, n) in enumerate(zip(weights, grads, each_groups, strict=True)):
        if not is_pair(weight, grad):
            check_tensor(weight, names[0].format(i))
            check_like(grad, names[1].format(i), weight, names[0].format(i))
        if n > 1 or not 1 < weight.dim() <= 5:
            _check_shape(weight, n, axes, names[0].format(i))
    if len({(w.device, w.dtype is torch.float64) for w in weights}) == 1:
        return _packed_moments(weights, grads, each_groups, axes, backend)

    # One table, and one launch, for each device and for float64.
    parts: dict[tuple[torch.device, bool], list[int]] = {}
    for i, weight in enumerate(weights):
        parts.setdefault((weight.device, weight.dtype is torch.float64), []).append(i)
    outputs: list[list[Tensor]] = [[torch.empty(0)] * len(weights) for _ in axes]
    for part in parts.values():
        tables = _packed_moments(
            [weights[i] for i in part],
            [grads[i] for i in part],
            [each_groups[i] for i in part],
            axes,
            backend,
        )
        for output, axis_tables in zip(outputs, tables, strict=True):
            for i, table in zip(part, axis_tables, strict=True):
                output[i] = table
    return outputs


def _packed_moments(
    weights: list[Tensor],
    grads: list[Tensor],
    groups: list[int],
    axes: tuple[int, ...],
    backend: str | None,
) -> list[list[Tensor]]:
    with torch.no_grad():
        packed = torch.ops.taylor_kernels.filter_moments(
            weights, grads, groups, 0 in axes, 1 in axes, backend
        )
    return [list(packed[axis].split(_filters(weights, groups, axis))) for axis in axes]


def _axes(dim: int | tuple[int, int]) -> tuple[int, ...]:
    axes = dim if isinstance(dim, tuple) else (dim,)
    if axes not in ((0,), (1,), (0, 1)):
        raise ValueError(f"dim: {dim!r} is not one of 0, 1 and (0, 1)")
    return axes


def _each_groups(groups: int | Sequence[int], count: int) -> list[int]:
    if not isinstance(groups, (int, Sequence)):
        raise TypeError(f"groups: expected an int or one for each tensor, got {groups!r}")
    each = [groups] * count if isinstance(groups, int) else list(groups)
    if len(each) != count:
        raise ValueError(
            f"groups: {len(each)} values for {count} weights; pass an int or one for each"
        )
    for value in each:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"groups: {value!r} is not a positive integer")
    return each


def _check_shape(weight: Tensor, groups: int, axes: tuple[int, ...], name: str) -> None:
    if not 1 <= weight.dim() <= 5:
        raise ValueError(f"{name}: has {weight.dim()} dimensions; a parameter has 1 to 5")
    if 1 in axes and weight.dim() == 1:
        raise ValueError(
            f"{name}: has no dim 1 (shape {tuple(weight.shape)}); use dim=0 for vectors"
        )
    if weight.size(0) % groups:
        raise ValueError(f"groups: {groups} does not divide the {weight.size(0)} rows of {name}")


def _filters(weights: Sequence[Tensor], groups: Sequence[int], axis: int) -> list[int]:
    """Of each weight."""
    if axis == 0:
        return [w.size(0) for w in weights]
    return [w.size(1) * n for w, n in zip(weights, groups, strict=True)]


def _run(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The op itself: two packed tables, empty where an axis was not asked for."""
    tables = _empty_tables(weights, grads, groups, rows, cols, backend)
    nothing = [None] * len(weights)
    row_outs, col_outs = (
        table.split(_filters(weights, groups, axis)) if wanted else nothing
        for axis, (table, wanted) in enumerate(zip(tables, (rows, cols), strict=True))
    )
    items = []
    for weight, grad, n, row_out, col_out in zip(
        weights, grads, groups, row_outs, col_outs, strict=True
    ):
        if weight.numel():
            items.append(parameter_item(weight, grad, None, n, row_out, col_out))
        else:  # sums over nothing
            for out in (row_out, col_out):
                if out is not None:
                    out.zero_()
    if items:
        run = select(items[0].weight.device, items[0].weight.dtype, backend)
        run.filter_moments(items)
    return tables


def _empty_tables(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The outputs' shapes; also the fake kernel, by which torch.compile and export trace the op."""
    dtype = accumulator(weights[0].dtype)
    rows_and_cols = (
        sum(_filters(weights, groups, axis)) if wanted else 0
        for axis, wanted in enumerate((rows, cols))
    )
    row_table, col_table = (
        weights[0].new_empty((n, len(MOMENTS)), dtype=dtype) for n in rows_and_cols
    )
    return row_table, col_table


library.define(
    "filter_moments(Tensor[] weights, Tensor[] grads, int[] groups, bool rows, bool cols, "
    "str? backend) -> (Tensor, Tensor)"
)
library.impl("filter_moments", _run, "CPU")
library.impl("filter_moments", _run, "CUDA")
torch.library.register_fake("taylor_kernels::filter_moments", _empty_tables, lib=library)
