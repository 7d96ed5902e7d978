"""hutchinson_moments: an estimate of every filter's curvature from one product of the Hessian.

For filter f with elements w_k, random signs z and the product (Hz)_k of the Hessian with them:

    moments[f] = Σ w_k² z_k (Hz)_k

z_k (Hz)_k is H_kk plus terms of z_k z_j that vanish in the mean over z (Hutchinson, Commun. Stat.
Simul. Comput. 1990), so half of a moment estimates ½ Σ w_k² H_kk without bias: the saliency of
Optimal Brain Damage (LeCun, Denker and Solla, NeurIPS 1989). If H is diagonal, one probe is exact.
AdaHessian (Yao et al., AAAI 2021) takes its curvature from such probes. z comes from
`rademacher_like` and is drawn again in the kernel, which reads nothing but w and Hz. Kernels:
csrc/common/ops.h, backends/triton/moments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, overload

from torch import Tensor

from taylor_kernels.ops._checks import check_seed
from taylor_kernels.ops._lists import (
    BothAxes,
    BothPacked,
    Draw,
    OneAxis,
    OnePacked,
    define_list_op,
    tables,
)

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

_op = define_list_op("hutchinson_moments", ("weights", "hvps"), (), draws=True)


class _Draws(TypedDict, total=False):
    seed: Required[int]
    streams: Sequence[int] | None


class _OneAxis(OneAxis, _Draws): ...


class _BothAxes(BothAxes, _Draws): ...


class _OnePacked(OnePacked, _Draws): ...


class _BothPacked(BothPacked, _Draws): ...


@overload
def hutchinson_moments(weights: Tensor, hvps: Tensor, **options: Unpack[_OneAxis]) -> Tensor: ...
@overload
def hutchinson_moments(
    weights: Tensor, hvps: Tensor, **options: Unpack[_BothAxes]
) -> tuple[Tensor, Tensor]: ...
@overload
def hutchinson_moments(
    weights: Sequence[Tensor], hvps: Sequence[Tensor], **options: Unpack[_OneAxis]
) -> list[Tensor]: ...
@overload
def hutchinson_moments(
    weights: Sequence[Tensor], hvps: Sequence[Tensor], **options: Unpack[_BothAxes]
) -> tuple[list[Tensor], list[Tensor]]: ...
@overload
def hutchinson_moments(
    weights: Sequence[Tensor], hvps: Sequence[Tensor], **options: Unpack[_OnePacked]
) -> Tensor: ...
@overload
def hutchinson_moments(
    weights: Sequence[Tensor], hvps: Sequence[Tensor], **options: Unpack[_BothPacked]
) -> tuple[Tensor, Tensor]: ...
def hutchinson_moments(
    weights: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    packed: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Σ w² z (Hz) of every filter of a parameter or of a list of them, in one launch.

    Half of it estimates the saliency of Optimal Brain Damage (LeCun et al., 1989) without bias
    (Hutchinson, 1990), H the Hessian and z random signs.

    Args:
        weights: a tensor or a sequence of such, as `filter_moments` takes them.
        hvps: the products Hz, each with its weight's shape, dtype and device.
        seed: that of `rademacher_like`.
        streams: those of `rademacher_like`; by default the place in the list. A list in another
            order, or a part of one, names the streams that its tensors had.
        dim, groups, packed, backend: as those of `filter_moments`.

    Returns:
        [F] float32 (float64 for float64 input); lists and pairs as `filter_moments` returns them.
        Not differentiable: the result has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors; a seed that is no int.
        ValueError: shapes, dtypes or devices that do not match; lists of unequal length; a seed,
            stream, `dim` or `groups` that does not fit.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> weights = [torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)]
        >>> loss = weights[0].square().sum()  # its Hessian is diagonal: one probe is exact
        >>> grads = torch.autograd.grad(loss, weights, create_graph=True)
        >>> signs = tk.rademacher_like(weights, seed=7)
        >>> hvps = torch.autograd.grad(grads, weights, grad_outputs=signs)
        >>> [table.tolist() for table in tk.hutchinson_moments(weights, hvps, seed=7)]
        [[10.0, 18.0]]
    """
    draw = Draw(check_seed(seed), streams)
    return tables(
        _op,
        weights,
        hvps=hvps,
        dim=dim,
        groups=groups,
        packed=packed,
        backend=backend,
        draw=draw,
    )
