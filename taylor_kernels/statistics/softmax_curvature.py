"""The curvature of a cross-entropy, in closed form.

Of a row of logits with p = softmax(z) and a target q, the loss c · CE(z, q) has the slope c (p − q)
and the Hessian c (diag p − p pᵀ), whatever q is. Taking the classes one after the other, with r
what is left of p and m its sum, the Hessian of what is left falls apart into that of "this class k
or another", of rank one, and that of the others:

    diag r − r rᵀ / m = v vᵀ + the same without k,   v = √(r_k m' / m) (r' / m' − e_k)

where r' is r without k and m' = m − r_k: the chain rule of a variance, and nothing cancels in it.
With the label taken first, v is the loss's own slope times a number: that part of the curvature
needs no backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_kernels.statistics.hooks.loss_inputs import LossFunction, generic

#: The least that a row is divided by.
_NOTHING = {torch.float32: 1e-30, torch.float64: 1e-200}
#: Distances over the norm, in units of rounding: of a product that may be off by as much as the
#: curvature that it stands for is small, and of one that is a cross-entropy's but for rounding
#: (which took 6 of up to 1,000 classes).
_EXACTLY = 64


@dataclass
class SoftmaxRows:
    """What of the loss reads one tensor: rows of logits, each in a cross-entropy.

    Attributes:
        p: [rows, classes].
        scale: [rows], c.
        target: [rows, classes], q, where c > 0.
        shape, dim: of the tensor, and where its classes are.
    """

    p: Tensor
    scale: Tensor
    target: Tensor
    shape: torch.Size
    dim: int

    def as_tensor(self, rows: Tensor) -> Tensor:
        moved = [*self.shape[: self.dim], *self.shape[self.dim + 1 :], self.shape[self.dim]]
        return rows.view(moved).movedim(-1, self.dim)

    def combined(self, signs: Tensor, left: Tensor | None = None) -> Tensor:
        """[rows, classes]: V·signs with V Vᵀ the Hessian, or of what is `left` of p."""
        r = self.p if left is None else left
        root = r.sqrt() * signs
        mass = r.sum(1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
        return self.scale.sqrt()[:, None] * (root - r * (root.sum(1, True) / mass))

    def label(self) -> tuple[Tensor, Tensor]:
        """([rows], [rows]): the label, and what the slope is to be multiplied by for its column.

        0 where the target is no label, or the slope is mostly rounding. A target that is nearly a
        label, of label smoothing or a sure teacher, is none to a model that is about as sure: what
        it lacks is to be small beside what p lacks.
        """
        label = self.target.argmax(1)
        chosen = self.target.gather(1, label[:, None])[:, 0]
        others = (self.target.abs().sum(1) - chosen.abs()).abs()
        of_label = self.p.gather(1, label[:, None])[:, 0]
        left = self.p.scatter(1, label[:, None], 0.0).sum(1)
        sure = torch.finfo(self.p.dtype).eps ** 0.5
        lacks = torch.maximum((chosen - 1).abs(), others)
        clean = (lacks < 0.002 * left) & (left > sure) & (self.scale > 0)
        factor = (of_label / (left * self.scale)).sqrt()
        return label, torch.where(clean, factor, 0.0)

    def leading(self, count: int, signs: Tensor, first: Tensor | None = None) -> Iterator[Tensor]:
        """Up to `count` of [rows, classes]; if that is fewer than the rank, the last is a random
        combination of all that is left.

        Args:
            signs: [rows, classes]
            first: [rows], classes that are left out beforehand; -1 for none.
        """
        r, rank = self.p, self.p.size(1) - 1
        if first is not None:
            r = torch.where(torch.arange(r.size(1), device=r.device) == first[:, None], 0.0, r)
            rank -= int((first >= 0).all())
        tiny = torch.finfo(r.dtype).tiny
        for _ in range(rank if count >= rank else count - 1):
            most, k = r.max(1, keepdim=True)
            rest = r.scatter(1, k, 0.0)
            mass, left = r.sum(1, True).clamp_min(tiny), rest.sum(1, True)
            length = (most * left / mass).sqrt()
            column = (rest / left.clamp_min(tiny) * length).scatter(1, k, -length)
            yield self.scale.sqrt()[:, None] * column * signs[:, :1]
            r = rest
        if count < rank:
            yield self.combined(signs, r)


def softmax_rows(loss: LossFunction, *, exactly: bool = False) -> list[SoftmaxRows] | None:
    """Of each tensor that the loss reads, or None where it is not made of cross-entropies.

    That is seen in the Hessian's product with a vector like no other: no other Hessian has it.

    Args:
        exactly: but for rounding; else what is a small share of a cross-entropy's curvature may
            come on top, and is left out.
    """
    values = [value for value in loss.values if value is not None]
    if len(values) != len(loss.slopes) or any(value.dim() < 2 for value in values):
        return None
    dims = (-1,) if all(value.dim() == 2 for value in values) else (-1, 1)
    for dim in dims:
        found = _matching(loss, values, dim, exactly)
        if found and _flat_where_no_scale(loss, found):
            return found
    return None


def _matching(
    loss: LossFunction, values: Sequence[Tensor], dim: int, exactly: bool
) -> list[SoftmaxRows] | None:
    found = []
    if any(value.size(dim) < 2 for value in values):
        return None  # one number has no softmax, and any loss
    for value, slope, vector, product in zip(values, loss.slopes, *loss.look(dim), strict=True):
        p = _rows(value.to(torch.promote_types(value.dtype, torch.float32)), dim).softmax(1)
        v, got, g = (_rows(one, dim).to(p) for one in (vector, product, slope))
        form = p * (v - (p * v).sum(1, keepdim=True))
        nothing, eps = _NOTHING[form.dtype], torch.finfo(slope.dtype).eps
        size = form.abs().amax(1, keepdim=True).clamp_min(nothing)
        form, got = form / size, got / size
        scale = (got * form).sum(1) / form.square().sum(1).clamp_min(nothing)
        error = (got - scale[:, None] * form).square().sum(1)
        close = (_EXACTLY * eps if exactly else min(8 * eps**0.5, 0.1)) ** 2
        if (scale < 0).any() or not (error <= close * got.square().sum(1)).all():
            return None
        target = p - g / scale.clamp_min(nothing)[:, None]
        target = torch.where((scale > 0)[:, None], target, 0.0)
        found.append(SoftmaxRows(p, scale, target, slope.shape, dim % slope.dim()))
    return found


def _flat_where_no_scale(loss: LossFunction, found: Sequence[SoftmaxRows]) -> bool:
    """Whether rows that the loss seems to leave out have no curvature, but for rounding.

    The vector looked with is 0 where a row is greatest, and a loss may read that number alone.
    """
    if all((rows.scale > 0).all() for rows in found):
        return True
    vectors = [generic(slope, number) for number, slope in enumerate(loss.slopes)]
    for rows, product in zip(found, loss.product(vectors), strict=True):
        size = _rows(product, rows.dim).abs().amax(1)[rows.scale == 0]
        if (size > torch.finfo(rows.p.dtype).eps ** 0.5 * rows.scale.max()).any():
            return False
    return True


def _rows(tensor: Tensor, dim: int) -> Tensor:
    moved = tensor.movedim(dim, -1)
    return moved.reshape(-1, moved.size(-1))
