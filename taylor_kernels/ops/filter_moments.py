"""filter_moments: five sums per filter over weights and their gradients, for a whole model at once.

For filter f with elements w_e and gradients g_e:

    moments[f] = ( Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g² )        (MOMENTS names them)

They are what the first-order Taylor criteria are made of: Molchanov et al., "Importance Estimation
for Neural Network Pruning" (CVPR 2019), eq. 8 is Σ(gw)² over the weights of a filter, and (Σgw)²
its joint form. Kernels: csrc/common/ops.h, backends/triton/moments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from taylor_kernels.ops._lists import (
    BothAxes,
    BothPacked,
    OneAxis,
    OnePacked,
    define_list_op,
    tables,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Names of the columns of a moments table.
MOMENTS = ("gw", "gw2", "abs_gw", "w2", "g2")

_op = define_list_op("filter_moments", ("weights", "grads"), (len(MOMENTS),), chooses=True)


class _OneAxis(OneAxis, total=False):
    moments: Sequence[str] | None


class _BothAxes(BothAxes, total=False):
    moments: Sequence[str] | None


class _OnePacked(OnePacked, total=False):
    moments: Sequence[str] | None


class _BothPacked(BothPacked, total=False):
    moments: Sequence[str] | None


@overload
def filter_moments(weights: Tensor, grads: Tensor, **options: Unpack[_OneAxis]) -> Tensor: ...
@overload
def filter_moments(
    weights: Tensor, grads: Tensor, **options: Unpack[_BothAxes]
) -> tuple[Tensor, Tensor]: ...
@overload
def filter_moments(
    weights: Sequence[Tensor], grads: Sequence[Tensor], **options: Unpack[_OneAxis]
) -> list[Tensor]: ...
@overload
def filter_moments(
    weights: Sequence[Tensor], grads: Sequence[Tensor], **options: Unpack[_BothAxes]
) -> tuple[list[Tensor], list[Tensor]]: ...
@overload
def filter_moments(
    weights: Sequence[Tensor], grads: Sequence[Tensor], **options: Unpack[_OnePacked]
) -> Tensor: ...
@overload
def filter_moments(
    weights: Sequence[Tensor], grads: Sequence[Tensor], **options: Unpack[_BothPacked]
) -> tuple[Tensor, Tensor]: ...
def filter_moments(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    *,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    packed: bool = False,
    moments: Sequence[str] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Moments of every filter of one parameter, or of a list of parameters in one launch.

    (Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g²) over the weights w of a filter and their gradients g, of
    which the first-order Taylor criteria are made (Molchanov et al., CVPR 2019, eq. 8).

    Args:
        weights: a tensor of 1 to 5 dimensions (float32, float16, bfloat16 or float64), or a
            sequence of such; any strides (contiguous and channels_last are read in place).
        grads: their gradients, each with its weight's shape, dtype and device.
        dim: 0 for output filters (F = size(0)), 1 for input channels (F = size(1) * groups),
            (0, 1) for both from one read. A transposed convolution stores its input channels
            first, so for it 0 means input channels and 1 output filters.
        groups: of a grouped convolution, an int or one per tensor. Used for dim 1: column
            j * size(1) + i is channel i of group j.
        packed: of a list, one table instead of a list of them: the filters of the first tensor,
            then those of the second, and so on. The call is shorter by the time that PyTorch takes
            to make a view for each parameter. The list is of one device, float64 throughout or
            nowhere. (Of one tensor the table is the same either way.)
        moments: which of `MOMENTS` are wanted, ("gw2",) for example; None for all. The table keeps
            its five columns. Those that are not wanted are NaN, on every backend, and the others
            have the bits that they have in a full call. On the CPU one of "gw", "gw2" and "abs_gw"
            alone takes less time where the inputs are in cache.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        [F, 5] float32 (float64 for float64 input), columns as in `MOMENTS`; for a sequence a list
        of such, or one with `packed`; for dim=(0, 1) a pair (rows, columns). The tables of a list
        share the memory of one packed table per device: none reaches into another, so each may be
        written in place, but torch.save of one saves them all, unless it is cloned.
        Bits do not depend on the rest of the list. Not differentiable: the result has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors; `moments` is no sequence
            of names; `packed` is no bool.
        ValueError: shapes, dtypes or devices that do not match; lists of unequal length; a `dim`
            or `groups` that does not fit; `packed` of several devices, or of float64 beside others;
            `moments` without a name, or with an unknown one.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> grad = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
        >>> tk.filter_moments(weight, grad).tolist()
        [[-1.0, 5.0, 3.0, 5.0, 2.0], [6.0, 36.0, 6.0, 25.0, 4.0]]
        >>> rows, columns = tk.filter_moments([weight], [grad], dim=(0, 1))
        >>> columns[0].tolist()
        [[7.0, 37.0, 7.0, 10.0, 5.0], [-2.0, 4.0, 2.0, 20.0, 1.0]]
        >>> tk.filter_moments([weight, weight], [grad, grad], packed=True).shape
        torch.Size([4, 5])
        >>> tk.filter_moments(weight, grad, moments=("gw2",)).tolist()
        [[nan, 5.0, nan, nan, nan], [nan, 36.0, nan, nan, nan]]
    """
    return tables(
        _op,
        weights,
        grads=grads,
        dim=dim,
        groups=groups,
        packed=packed,
        backend=backend,
        sums=None if moments is None else _bits(check_moments(moments)),
    )


@overload
def needed_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    moments: Sequence[str] | None,
    **options: Unpack[OneAxis],
) -> list[Tensor]: ...
@overload
def needed_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    moments: Sequence[str] | None,
    **options: Unpack[OnePacked],
) -> Tensor: ...
@overload
def needed_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    moments: Sequence[str] | None,
    **options: Unpack[BothAxes],
) -> tuple[list[Tensor], list[Tensor]]: ...
def needed_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    moments: Sequence[str] | None,
    **options: Any,
) -> Tensor | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """`filter_moments` of a list for a caller that reads no other columns, whatever they hold.

    Only the CPU's kernels save anything by leaving sums out. On a GPU all five come from the same
    read, and NaN in the others would be launches more.
    """
    if not all(weight.is_cpu for weight in weights):
        moments = None
    return filter_moments(weights, grads, moments=moments, **options)


def check_moments(moments: object) -> tuple[str, ...]:
    """Names of moments, at least one, or an error."""
    if isinstance(moments, str) or not isinstance(moments, Sequence):
        raise TypeError(f"moments: expected a sequence of names, such as ('gw2',), got {moments!r}")
    for name in moments:
        if name not in MOMENTS:
            raise ValueError(f"moments: {name!r} is not one of {', '.join(MOMENTS)}")
    if not moments:
        raise ValueError("moments: names none; pass at least one of them, or None for all")
    return tuple(moments)


def _bits(moments: Sequence[str]) -> int:
    return sum(1 << i for i, name in enumerate(MOMENTS) if name in moments)
