"""The curvature of the loss at the model's output, as a square root: what flows back of it.

With z_n the output of example n and H_n = ∂²L/∂z_n² = V_n V_nᵀ, the generalised Gauss-Newton
matrix of any quantity θ that the output depends on is Σ_n J_nᵀ H_n J_n, J_n = ∂z_n/∂θ (Schraudolph
2002). Its diagonal is Σ_n Σ_k (∂(z_n·v_nk)/∂θ)²: squares of what an ordinary backward pass from
the output gives for column k of V. It is the Hessian's for a network that is piecewise linear in θ
(ReLU, max pooling), and of it the part without the network's own second derivatives otherwise.
The loss alone is differentiated twice, the model never.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from taylor_kernels.statistics.hessian_product import (
    check_graph,
    second_derivatives,
    slopes_with_graph,
)

#: Outputs per example of which H is formed, [N, K, K].
MOST_OUTPUTS = 1024
#: Up to so many the root is made of eigenvectors, none of which is 0; of more, by Cholesky, which
#: took an eighth of the time (K = 1000, CPU).
FEW_OUTPUTS = 32
_OF_LOSS = "closure: its loss cannot be differentiated twice: {}; use obd_fisher or taylor_fo_bn"
#: Share of the curvature that may be negative, and is then left out: rounding, no more.
_NEGLIGIBLE = 0.05


def curvature_root(loss: Tensor, output: Tensor) -> Tensor:
    """V [N, K, R] with V_n V_nᵀ = ∂²loss/∂output_n², K = output[0].numel(), R ≤ K.

    Raises:
        ValueError: more outputs than `MOST_OUTPUTS`; a loss in which examples (dim 0 of the
            output) meet, that does not depend on the output, or that curves downwards.
    """
    size = output[0].numel()
    if size > MOST_OUTPUTS:
        raise ValueError(
            f"model: has {size} outputs per example, and this criterion forms the loss's Hessian "
            f"for up to {MOST_OUTPUTS}; use taylor_so_bn, or taylor_fo_bn for first order"
        )
    hessian = _hessian(loss, output)
    if not hessian.isfinite().all():
        return hessian  # what is not finite reaches the scores
    if size > FEW_OUTPUTS:
        rounding = 8 * torch.finfo(hessian.dtype).eps * hessian.diagonal(0, 1, 2).amax(1)
        shift = torch.eye(size).to(hessian) * (rounding + 1e-30)[:, None, None]
        root, failed = torch.linalg.cholesky_ex(hessian + shift)
        if not failed.any():
            return root
    values, vectors = torch.linalg.eigh(hessian)
    negative, total = values.clamp(max=0).abs().sum(), values.abs().sum()
    # Of a model that is sure of all examples, little but rounding is left.
    noise = hessian[..., 0].numel() * 8 * torch.finfo(torch.float32).eps
    if negative > _NEGLIGIBLE * total + noise:
        raise ValueError(
            "closure: its loss is not convex in the model's output, so it has no square root of "
            "curvature; use taylor_so_bn, which needs none"
        )
    share = values.clamp(min=0).sum(0)
    kept = share > torch.finfo(values.dtype).eps * share.sum()  # softmax: one is 0 for certain
    values, vectors = values[:, kept], vectors[:, :, kept]
    return vectors * values.clamp(min=0).sqrt().unsqueeze(1)


def _hessian(loss: Tensor, output: Tensor) -> Tensor:
    """[N, K, K] of the examples, in float32 at least."""
    (slope,) = slopes_with_graph(loss, [output])
    if slope is None:
        raise ValueError(
            "closure: its loss does not depend on what the model returned; compute it from that, "
            "or use taylor_so_bn, which takes any loss"
        )
    dtype = torch.promote_types(output.dtype, torch.float32)
    n, size = output.size(0), output[0].numel()

    def rows(weights: Tensor) -> Tensor:
        """[N, K]: Σ_m Σ_k weights[m, k] ∂²loss / ∂z[m, k] ∂z."""
        (row,) = torch.autograd.grad(
            slope, output, weights.view_as(slope), retain_graph=True, allow_unused=True
        )
        row = torch.zeros_like(output) if row is None else row.detach()
        return row.reshape(n, size).to(dtype)

    check_graph([slope], _OF_LOSS)
    units = torch.eye(size, dtype=slope.dtype, device=slope.device)
    with second_derivatives(_OF_LOSS):
        hessian = torch.stack([rows(unit.expand(n, -1).contiguous()) for unit in units], 1)
    if hessian.isfinite().all() and _examples_meet(rows, n, size, slope):
        raise ValueError(
            "closure: its loss lets examples meet (dim 0 of the model's output), as a contrastive "
            "loss does, so that they have no curvature each; use taylor_so_bn"
        )
    if slope.any() and not hessian.any():
        warnings.warn(
            "closure: its loss is linear in what the model returned (as l1_loss is, or nll_loss "
            "behind a log_softmax in the model), so this criterion finds no curvature; let the "
            "model return logits and take their cross_entropy, or use taylor_so_bn",
            stacklevel=8,
        )
    return (hessian + hessian.transpose(1, 2)) / 2


def _examples_meet(rows: Callable[[Tensor], Tensor], n: int, size: int, like: Tensor) -> bool:
    """Whether anything flows from an example into another.

    Exactly nothing may: against a tolerance, examples that the model is sure of, whose curvature
    is all rounding, would seem to meet. Two examples differ in a digit of their binary numbers.
    """
    numbers = torch.arange(n, device=like.device)
    mix = torch.linspace(-1, 2, size, dtype=like.dtype, device=like.device)
    for digit in range((n - 1).bit_length()):
        marked = (numbers >> digit) & 1
        flow = rows(marked[:, None] * mix)
        if flow[marked == 0].any():
            return True
    return False


def sign_probe(root: Tensor, generator: torch.Generator) -> Tensor:
    """[N, K]: V_n ε_n with random signs ε; E of the outer product is ∂²loss/∂output_n²."""
    n, _, rank = root.shape
    signs = torch.randint(0, 2, (n, rank), generator=generator).to(root) * 2 - 1
    return (root * signs.unsqueeze(1)).sum(2)
