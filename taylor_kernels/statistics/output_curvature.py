"""The curvature of the loss at what it reads of the model, as vectors to flow back from there.

With z what the loss reads and H = ∂²L/∂z² = E Σ_i σ_i c_i c_iᵀ, signs σ_i, the generalised
Gauss-Newton matrix of any quantity θ that z depends on is Jᵀ H J, J = ∂z/∂θ (Schraudolph 2002). Its
diagonal is E Σ_i σ_i (∂(z·c_i)/∂θ)²: squares of what an ordinary backward pass from z gives for the
column c_i. It is the Hessian's for a network that is piecewise linear in θ (ReLU, max pooling), and
of it the part without the network's own second derivatives otherwise. The loss alone is
differentiated twice, the model never.

`exact_columns` has all columns of each example's H: in closed form of cross-entropies and of a
diagonal H (closed_curvature.py), of anything else those of a root that is computed.
`sampled_columns` has few, whose random signs make the expectation right: of cross-entropies the
leading ones and a combination of the rest in closed form (softmax_curvature.py), of few outputs
those of eigenvectors, and of anything else, with random signs ε and a positive diagonal S, S ε and
H S⁻¹ ε, since E S ε (H S⁻¹ ε)ᵀ = H (Hutchinson 1990; S balances the two). As a difference of
squares of their half sum and half difference, that is two columns; of a diagonal H = ± S² one of
them is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taylor_kernels.ops.rademacher import rademacher_like
from taylor_kernels.statistics.closed_curvature import closed_columns
from taylor_kernels.statistics.hooks.loss_inputs import LossFunction, generic
from taylor_kernels.statistics.softmax_curvature import SoftmaxRows, softmax_rows

#: Outputs per example of which H is formed, [N, K, K].
MOST_OUTPUTS = 1024
#: Up to so many the root is made of eigenvectors, none of which is 0; of more, by Cholesky, which
#: took an eighth of the time (K = 1000, CPU).
FEW_OUTPUTS = 32
#: Share of the curvature that may be negative, and is then left out: rounding, no more.
_NEGLIGIBLE = 1e-3
#: Products with random vectors that show how large H is where.
_LOOKS = 2


class Column(NamedTuple):
    """Vectors to flow back, one for each tensor that the loss reads, and σ."""

    vectors: list[Tensor]
    sign: int = 1


class Columns(NamedTuple):
    """A factor of H.

    Attributes:
        columns: they are made as they are asked for.
        apart: squares are to be taken of each example's slopes, which are sums over examples
            otherwise: the loss lets examples meet, or was said to.
        of_slope: [N]; the loss's own slopes times these are a further column.
    """

    columns: Iterator[Column]
    apart: bool = True
    of_slope: Tensor | None = None


def warn_if_linear(loss: LossFunction, stacklevel: int) -> None:
    """Say so if a loss has slopes and no curvature."""
    if not loss.bends:
        warnings.warn(
            "closure: its loss is linear in what the model's last layers returned (as l1_loss is), "
            "so this criterion finds no curvature; use taylor_so_bn, or taylor_fo_bn",
            stacklevel=stacklevel,
        )


def exact_columns(loss: LossFunction, *, many: bool = False) -> Columns:
    """Σ_i σ_i c_i c_iᵀ = H of every example, at most two columns for each of its outputs.

    Args:
        many: of cross-entropies, or of an H that is diagonal, there may be any number of columns.

    Raises:
        ValueError: more outputs than `MOST_OUTPUTS`; tensors of different numbers of examples
            (dim 0), or a loss in which examples meet.
    """
    if loss.examples is None:
        shapes = ", ".join(str(tuple(slope.shape)) for slope in loss.slopes)
        raise ValueError(
            f"closure: its loss reads tensors of shapes {shapes}, which do not have the same "
            "examples (dim 0); use taylor_so_diag or "
            "samples= of ParameterFisher, which sample"
        )
    size = _outputs(loss)
    closed = closed_columns(loss) if many or size <= MOST_OUTPUTS else None
    if closed is None and size > MOST_OUTPUTS:
        raise ValueError(
            f"model: has {size} outputs per example, and this criterion forms the loss's Hessian "
            f"for up to {MOST_OUTPUTS}; use taylor_so_diag or "
            "samples= of ParameterFisher, which sample"
        )
    hessian = _hessian(loss) if closed is None else None
    if _examples_meet(loss):
        raise ValueError(
            "closure: its loss lets examples meet (dim 0 of the model's output), as a contrastive "
            "loss does, so that they have no curvature each; use taylor_so_diag or "
            "samples= of ParameterFisher, which sample"
        )
    if hessian is None:
        assert closed is not None
        return Columns(Column(vectors, sign) for vectors, sign in closed)
    parts = zip((1, -1), _roots(hessian), strict=True)
    return Columns(
        Column(_split(column, loss), sign) for sign, root in parts for column in root.unbind(2)
    )


def sampled_columns(
    loss: LossFunction, passes: int, seed: int, *, apart: bool = True, leading: bool = True
) -> Columns:
    """E Σ_i σ_i c_i c_iᵀ = H: `passes` columns, twice as many of a loss that is not convex.

    Args:
        seed: equal seeds give equal columns.
        apart: squares can be taken of each example's slopes.
        leading: of each example the leading columns may be taken alone, and the loss's slope; else
            all columns are alike, random combinations.
    """
    apart = apart and loss.examples is not None
    if softmax := softmax_rows(loss):
        one = len(softmax) == 1 and len(softmax[0].p) == loss.examples
        if one and apart and leading:
            return _leading_of_softmax(softmax[0], passes, seed)
        return Columns(_combined_softmax(softmax, passes, seed), apart)
    apart = apart and not _examples_meet(loss)
    if apart and _outputs(loss) <= FEW_OUTPUTS:
        roots = _roots(_hessian(loss))
        return Columns(_of_roots(loss, roots, passes, seed, leading))
    return Columns(_balanced(loss, passes, seed), apart)


def _leading_of_softmax(rows: SoftmaxRows, passes: int, seed: int) -> Columns:
    label, factor = rows.label()
    free = bool((factor > 0).any())
    first = label.where(factor > 0, -1) if free else None
    signs = _signs([rows.p], seed, 0)[0]
    columns = (Column([rows.as_tensor(c)]) for c in rows.leading(passes, signs, first))
    return Columns(columns, of_slope=factor if free else None)


def _combined_softmax(softmax: Sequence[SoftmaxRows], passes: int, seed: int) -> Iterator[Column]:
    for draw in range(passes):
        signs = _signs([rows.p for rows in softmax], seed, draw)
        yield Column(
            [
                rows.as_tensor(rows.combined(sign)) / passes**0.5
                for rows, sign in zip(softmax, signs, strict=True)
            ]
        )


def _of_roots(
    loss: LossFunction, roots: tuple[Tensor, Tensor], passes: int, seed: int, leading: bool
) -> Iterator[Column]:
    """The leading columns of a root and a random combination of the others, or only such."""
    for number, (sign, root) in enumerate(zip((1, -1), roots, strict=True)):
        rank = root.size(2)
        alone = rank if rank <= passes else passes - 1
        if not leading:
            alone = 0
        order = root.abs().sum(1).mean(0).argsort(descending=True)
        for column in root[:, :, order[:alone]].unbind(2):
            yield Column(_split(column, loss), sign)
        rest = root[:, :, order[alone:]]
        for draw in range(0 if alone == rank else 1 if leading else passes):
            (signs,) = _signs([rest[:, 0]], seed, 2 * draw + number)
            scale = 1.0 if leading else passes**-0.5
            yield Column(_split(scale * (rest * signs[:, None]).sum(2), loss), sign)


def _balanced(loss: LossFunction, passes: int, seed: int) -> Iterator[Column]:
    """From products with random vectors, whatever the loss."""
    like = [slope.to(loss.dtype) for slope in loss.slopes]
    large = [torch.zeros_like(one) for one in like]
    for look in range(_LOOKS):
        signs = _signs(like, seed, look)
        probe = [generic(one, i) * signs[i] for i, one in enumerate(like)]
        for total, one, product in zip(large, probe, loss.product(probe), strict=True):
            total.add_((product / one).square())
    scale = [(total / _LOOKS) ** 0.25 for total in large]
    least = 0.01 * max(float(one.square().mean()) for one in scale) ** 0.5
    scale = [one.clamp_min(least) * (one != 0) for one in scale]
    inverse = [torch.where(one > 0, 1 / one, 0.0) for one in scale]
    for draw in range(passes):
        signs = _signs(like, seed, _LOOKS + draw)
        given = [s * sign for s, sign in zip(inverse, signs, strict=True)]
        products = loss.product(given)
        halves = [
            [
                (s * sign + half * p.to(s)) / (2 * passes**0.5)
                for s, sign, p in zip(scale, signs, products, strict=True)
            ]
            for half in (1, -1)
        ]
        sizes = [sum(float(part.square().sum()) for part in half) for half in halves]
        rounding = _NEGLIGIBLE**2 * max(sizes)
        for columns, which, size in zip(halves, (1, -1), sizes, strict=True):
            if not size <= rounding:
                yield Column(columns, which)


def _signs(like: Sequence[Tensor], seed: int, draw: int) -> list[Tensor]:
    streams = range((draw + 1) * len(like), (draw + 2) * len(like))
    return rademacher_like(list(like), seed=seed, streams=list(streams))


def _roots(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K, R] each: of what curves upwards, and of what curves downwards."""
    none = hessian[:, :, :0]
    if not hessian.isfinite().all():
        return hessian, none  # what is not finite reaches the scores
    size = hessian.size(1)
    if size > FEW_OUTPUTS:
        rounding = 8 * torch.finfo(hessian.dtype).eps * hessian.diagonal(0, 1, 2).amax(1)
        shift = torch.eye(size).to(hessian) * (rounding + 1e-30)[:, None, None]
        root, failed = torch.linalg.cholesky_ex(hessian + shift)
        if not failed.any():
            return root, none
    values, vectors = torch.linalg.eigh(hessian)
    up, down = values.clamp(min=0), (-values).clamp(min=0)
    # Of a model that is sure of all examples, little but rounding is left.
    noise = hessian[..., 0].numel() * 8 * torch.finfo(torch.float32).eps
    if down.sum() <= _NEGLIGIBLE * up.sum() + noise:
        down = torch.zeros_like(down)
    return _kept(vectors, up, up.sum()), _kept(vectors, down, up.sum() + down.sum())


def _kept(vectors: Tensor, values: Tensor, total: Tensor) -> Tensor:
    kept = values.sum(0) > torch.finfo(values.dtype).eps * total  # softmax: one is 0 for certain
    return vectors[:, :, kept] * values[:, kept].sqrt().unsqueeze(1)


def _outputs(loss: LossFunction) -> int:
    """How many numbers of each example the loss reads."""
    return sum(slope[0].numel() for slope in loss.slopes)


def _split(column: Tensor, loss: LossFunction) -> list[Tensor]:
    """The tensors of [N, K]."""
    return list(column.split([slope[0].numel() for slope in loss.slopes], 1))


def _joined(loss: LossFunction, rows: Tensor) -> Tensor:
    """[N, K]: H times [N, K]."""
    products = loss.product(_split(rows, loss))
    return torch.cat([product.reshape(len(rows), -1).to(loss.dtype) for product in products], 1)


def _hessian(loss: LossFunction) -> Tensor:
    """[N, K, K] of the examples, in float32 at least."""
    assert loss.examples is not None
    like = loss.slopes[0]
    units = torch.eye(_outputs(loss), dtype=loss.dtype, device=like.device)
    rows = [_joined(loss, unit.expand(loss.examples, -1).contiguous()) for unit in units]
    hessian = torch.stack(rows, 1)
    return (hessian + hessian.transpose(1, 2)) / 2


def _examples_meet(loss: LossFunction) -> bool:
    """Whether anything flows from an example into another.

    Exactly nothing may: against a tolerance, examples that the model is sure of, whose curvature
    is all rounding, would seem to meet. Two examples differ in a digit of their binary numbers.
    """
    assert loss.examples is not None
    numbers = torch.arange(loss.examples, device=loss.slopes[0].device)
    mix = generic(numbers.new_empty(_outputs(loss), dtype=loss.dtype), 0)
    for digit in range((loss.examples - 1).bit_length()):
        marked = (numbers >> digit) & 1
        flow = _joined(loss, marked[:, None] * mix)
        if not flow.isfinite().all():
            return False  # what is not finite says nothing, and reaches the scores
        if flow[marked == 0].any():
            return True
    return False
