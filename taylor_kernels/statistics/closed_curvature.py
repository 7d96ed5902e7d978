"""All columns of a root of the loss's Hessian, where they have a closed form.

Of cross-entropies see softmax_curvature.py. A squared error, or any loss of each output alone, has
a diagonal Hessian, whose root has a column √|h_k| e_k for each output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taylor_kernels.statistics.hooks.loss_inputs import LossFunction, generic
from taylor_kernels.statistics.softmax_curvature import SoftmaxRows, softmax_rows

#: Vectors to flow back, one for each tensor that the loss reads, and the sign of their square.
Signed = tuple[list[Tensor], int]


def closed_columns(loss: LossFunction) -> Iterator[Signed] | None:
    """Σ_i σ_i c_i c_iᵀ = H of every example; None where there is no closed form."""
    if softmax := softmax_rows(loss, exactly=True):
        return _of_softmax(loss, softmax)
    diagonal = _diagonal(loss)
    return None if diagonal is None else _of_diagonal(diagonal, loss)


def _of_softmax(loss: LossFunction, softmax: Sequence[SoftmaxRows]) -> Iterator[Signed]:
    """C − 1 for each row of C classes that an example has."""
    assert loss.examples is not None
    for place, rows in enumerate(softmax):
        ones = torch.ones_like(rows.p[:, :1])
        for column in rows.leading(rows.p.size(1), ones):
            of_examples = column.view(loss.examples, -1, column.size(1))
            for number in range(of_examples.size(1)):
                alone = torch.zeros_like(of_examples)
                alone[:, number] = of_examples[:, number]
                if alone.any():  # it is 0 of a row that the loss leaves out
                    yield _at(loss, place, rows.as_tensor(alone.flatten(0, 1))), 1


def _of_diagonal(diagonal: Sequence[Tensor], loss: LossFunction) -> Iterator[Signed]:
    """One for each output of an example, or two where examples differ in its sign."""
    for place, one in enumerate(diagonal):
        roots = one.abs().sqrt().flatten(1)
        for number in range(roots.size(1)):
            for sign in (1, -1):
                column = torch.zeros_like(roots)
                bent = one.flatten(1)[:, number].sign() == sign
                column[:, number] = roots[:, number].where(bent, 0.0)
                if bent.any():
                    yield _at(loss, place, column.view_as(one)), sign


def _at(loss: LossFunction, place: int, vector: Tensor) -> list[Tensor]:
    """0 for all tensors that the loss reads but one."""
    vectors = [torch.zeros_like(slope, dtype=vector.dtype) for slope in loss.slopes]
    vectors[place] = vector
    return vectors


def _diagonal(loss: LossFunction) -> list[Tensor] | None:
    """H where it is a diagonal matrix, like the slopes; else None.

    Any other takes a vector like no other elsewhere than its product with ones says.
    """
    like = [slope.to(loss.dtype) for slope in loss.slopes]
    diagonal = [
        p.to(z) for p, z in zip(loss.product([torch.ones_like(z) for z in like]), like, strict=True)
    ]
    vectors = [generic(z, number) for number, z in enumerate(like)]
    products = loss.product(vectors)
    for d, v, product, slope in zip(diagonal, vectors, products, loss.slopes, strict=True):
        off = (product - d * v).abs()
        if not (off <= 8 * torch.finfo(slope.dtype).eps * (d * v).abs()).all():
            return None
    return diagonal
