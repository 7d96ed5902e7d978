"""hutchinson_moments: an estimate of every filter's curvature from one product of the Hessian.

For filter f with elements w_k, random signs z and the product (Hz)_k of the Hessian with them:

    moments[f] = Σ w_k² z_k (Hz)_k

z_k (Hz)_k is H_kk plus terms of z_k z_j that vanish in the mean over z (Hutchinson, Commun. Stat.
Simul. Comput. 1990), so half of a moment estimates ½ Σ w_k² H_kk without bias: the saliency of
Optimal Brain Damage (LeCun, Denker and Solla, NeurIPS 1989). If H is diagonal, one probe is exact.
AdaHessian (Yao et al., AAAI 2021) takes its curvature from such probes. z comes from
`rademacher_like` and is drawn again in the kernel, which reads nothing but w and Hz. Kernels:
csrc/common/hutchinson_moments.h, backends/triton/hutchinson_moments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from taylor_kernels.backends import select
from taylor_kernels.ops._checks import check_seed, check_streams
from taylor_kernels.ops._library import library
from taylor_kernels.ops._lists import empty_tables, parameters, tables


@overload
def hutchinson_moments(
    weights: Tensor,
    hvps: Tensor,
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    dim: int = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor: ...
@overload
def hutchinson_moments(
    weights: Tensor,
    hvps: Tensor,
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    dim: tuple[int, int],
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def hutchinson_moments(
    weights: Sequence[Tensor],
    hvps: Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    dim: int = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> list[Tensor]: ...
@overload
def hutchinson_moments(
    weights: Sequence[Tensor],
    hvps: Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    dim: tuple[int, int],
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]: ...
def hutchinson_moments(
    weights: Tensor | Sequence[Tensor],
    hvps: Tensor | Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor] | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Σ w² z (Hz) of every filter of a parameter or of a list of them, in one launch.

        z = tk.rademacher_like(weights, seed=step)
        hvps = torch.autograd.grad(grads, weights, grad_outputs=z)
        curvature = tk.hutchinson_moments(weights, hvps, seed=step)

    Args:
        weights: a tensor of 1 to 5 dimensions (float32, float16, bfloat16 or float64), or a
            sequence of such; any strides (contiguous and channels_last are read in place).
        hvps: the products Hz, each with its weight's shape, dtype and device.
        seed: that of `rademacher_like`.
        streams: those of `rademacher_like`; by default the place in the list. A list in another
            order, or a part of one, names the streams that its tensors had.
        dim, groups, backend: as those of `filter_moments`.

    Returns:
        [F] float32 (float64 for float64 input); lists and pairs as `filter_moments` returns them.
        Not differentiable: the result has no grad_fn.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors; a seed that is no int.
        ValueError: shapes, dtypes or devices that do not match; lists of unequal length; a seed,
            stream, `dim` or `groups` that does not fit.
        RuntimeError: the named backend cannot run here.
    """
    seed = check_seed(seed)
    each_stream = check_streams(streams, len(weights) if isinstance(weights, Sequence) else 1)

    def launch(
        places: Sequence[int], lists: list[list[Tensor]], groups: list[int], rows: bool, cols: bool
    ) -> tuple[Tensor, Tensor]:
        of_part = [each_stream[i] for i in places]
        return torch.ops.taylor_kernels.hutchinson_moments(
            *lists, groups, rows, cols, seed, of_part, backend
        )

    return tables(launch, dim, groups, backend, weights, hvps=hvps)


def _run(
    weights: Sequence[Tensor],
    hvps: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    seed: int,
    streams: Sequence[int],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The op itself: two packed tables, empty where an axis was not asked for."""
    out = _empty(weights, hvps, groups, rows, cols, seed, streams, backend)
    items = parameters(out, weights, None, hvps, groups, rows, cols, streams)
    kernels = select(weights[0].device, weights[0].dtype, backend)
    if items:
        kernels.hutchinson_moments(items, seed)
    return out


def _empty(
    weights: Sequence[Tensor],
    hvps: Sequence[Tensor],
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    seed: int,
    streams: Sequence[int],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The outputs' shapes; also the fake kernel."""
    return empty_tables((), weights, groups, rows, cols)


library.define(
    "hutchinson_moments(Tensor[] weights, Tensor[] hvps, int[] groups, bool rows, bool cols, "
    "int seed, int[] streams, str? backend) -> (Tensor, Tensor)"
)
library.impl("hutchinson_moments", _run, "CPU")
library.impl("hutchinson_moments", _run, "CUDA")
torch.library.register_fake("taylor_kernels::hutchinson_moments", _empty, lib=library)
