"""second_order_moments: two sums per filter over weights, gradients and a Hessian's product.

For filter f with elements w_e, gradients g_e and (Hv)_e, a product of the Hessian and a vector:

    moments[f] = ( (Σ q)², Σ q² ),   q = g·w − ½·w·(Hv)

With v = w, −Σ q over all weights is how the loss changes, to second order, as they go to zero, and
q_e is the share of one. Its square is the second-order importance of Molchanov et al., "Importance
Estimation for Neural Network Pruning" (CVPR 2019); (Σ q)² takes a filter as a group of weights, as
(Σ gw)² does to first order. v may as well be other than w, such as the weights of one layer with
zeros elsewhere. Kernels: csrc/common/ops.h, backends/triton/moments.py.
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

_op = define_list_op("second_order_moments", ("weights", "grads", "hvps"), (2,))


@overload
def second_order_moments(
    weights: Tensor, grads: Tensor, hvps: Tensor, **options: Unpack[OneAxis]
) -> Tensor: ...
@overload
def second_order_moments(
    weights: Tensor, grads: Tensor, hvps: Tensor, **options: Unpack[BothAxes]
) -> tuple[Tensor, Tensor]: ...
@overload
def second_order_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    **options: Unpack[OneAxis],
) -> list[Tensor]: ...
@overload
def second_order_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    **options: Unpack[BothAxes],
) -> tuple[list[Tensor], list[Tensor]]: ...
@overload
def second_order_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    **options: Unpack[OnePacked],
) -> Tensor: ...
@overload
def second_order_moments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor],
    **options: Unpack[BothPacked],
) -> tuple[Tensor, Tensor]: ...
def second_order_moments(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    *,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    packed: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """((Σ q)², Σ q²), q = g·w − ½·w·(Hv), of every filter of a parameter or of a list of them.

    The second-order importance of Molchanov et al. (CVPR 2019), of filters and summed over weights.

    Args:
        weights: a tensor or a sequence of such, as `filter_moments` takes them.
        grads: their gradients, each with its weight's shape, dtype and device.
        hvps: the products Hv, likewise; for Taylor scores v = w, as in
            `torch.autograd.grad(grads, weights, grad_outputs=weights)`.
        dim, groups, packed, backend: as those of `filter_moments`.

    Returns:
        [F, 2] float32 (float64 for float64 input); lists and pairs as `filter_moments` returns
        them. Not differentiable: the result has no grad_fn.

    Raises:
        TypeError, ValueError, RuntimeError: as `filter_moments`.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
        >>> loss = weight.square().sum()  # q is exact: w² is what an element adds to it
        >>> grads = torch.autograd.grad(loss, weight, create_graph=True)
        >>> hvps = torch.autograd.grad(grads, weight, grad_outputs=weight)
        >>> tk.second_order_moments(weight, *grads, *hvps).tolist()
        [[25.0, 17.0], [81.0, 81.0]]
    """
    return second_order_sums(
        weights,
        grads,
        hvps,
        dim=dim,
        groups=groups,
        packed=packed,
        backend=backend,
        squared=True,
    )


def second_order_sums(
    weights: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    *,
    squared: bool = False,
    **options: Any,
) -> Any:
    """(Σ q, Σ q²), otherwise as `second_order_moments`: sums that add up over coupled filters."""

    finish = _square_first if squared else None
    return tables(_op, weights, grads=grads, hvps=hvps, finish=finish, **options)


def _square_first(table: Tensor) -> None:
    joint = table.select(1, 0)
    joint.mul_(joint)  # square_() has no rule for vmap
