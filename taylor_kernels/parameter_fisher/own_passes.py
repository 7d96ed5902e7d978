"""The passes of a closure: back through its loss once, or once for each column of a curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice
from typing import Literal

import torch
from torch import Tensor

from taylor_kernels.parameter_fisher.watch import Watch
from taylor_kernels.statistics.hooks.closure import differentiating, run_closure
from taylor_kernels.statistics.hooks.loss_inputs import LossFunction, LossInputs
from taylor_kernels.statistics.output_curvature import Column, exact_columns, sampled_columns

Matrix = Literal["empirical", "gauss_newton"]


class OwnPasses:
    """Runs closures on a model that is watched, which hands on the squares of each pass.

    Args:
        samples: random probes in place of the columns of a Gauss-Newton matrix; None: all columns.

    Attributes:
        sign: of the part of the curvature whose squares arrive.
    """

    def __init__(self, watch: Watch, matrix: Matrix, samples: int | None) -> None:
        self._watch, self._matrix, self._samples = watch, matrix, samples
        self.sign = 1

    def run(self, closure: Callable[[], Tensor], seed: int) -> None:
        """The closure's pass, and back through it once, or once for each column.

        Args:
            seed: of the probes.

        Raises:
            ValueError: the closure returned no scalar that depends on the model, or one in which
                examples meet, so that these have no curvature each.
        """
        watch = self._watch
        watch.own_closure = True
        try:
            with differentiating():
                if self._matrix == "empirical":
                    watch.ends.flow([run_closure(closure)], None, keep=False)
                else:
                    self._run_columns(closure, seed)
        finally:
            watch.own_closure = watch.separate = False

    def _run_columns(self, closure: Callable[[], Tensor], seed: int) -> None:
        watch = self._watch
        watch.separate = True
        inputs = LossInputs(watch.model)
        with inputs.noted():
            loss = inputs.function(run_closure(closure), ())
        if self._samples:
            factor = sampled_columns(loss, self._samples, seed, leading=False)
        else:
            factor = exact_columns(loss, many=True)
        if not factor.apart:
            raise ValueError(
                "closure: its loss lets examples meet (dim 0 of the model's output), as a "
                "contrastive loss does, so that they have no curvature each"
            )
        # No more than take as much room together as the parameters do.
        room = sum(p.numel() * p.element_size() for p in watch.parameters.values())
        at_once = watch.ends.passes_at_once(room)
        try:
            for self.sign, columns in groupby(factor.columns, lambda column: column.sign):
                while some := list(islice(columns, at_once)):
                    if len(some) > 1 and not self._flow_together(loss, some):
                        at_once = 1
                    if len(some) == 1 or at_once == 1:
                        for column in some:
                            watch.ends.flow(loss.roots, _given(loss, column), keep=True)
                            watch.reduce()
        finally:
            self.sign = 1

    def _flow_together(self, loss: LossFunction, columns: Sequence[Column]) -> bool:
        """Several columns in one backward pass; False where that cannot be."""
        given = [torch.stack(z) for z in zip(*(_given(loss, c) for c in columns), strict=True)]
        if not self._watch.ends.flow_together(loss.roots, given):
            return False
        self._watch.reduce()
        return True


def _given(loss: LossFunction, column: Column) -> list[Tensor]:
    """A column as what flows back from the tensors that the loss reads."""
    return [
        vector.view_as(slope).to(slope)
        for vector, slope in zip(column.vectors, loss.slopes, strict=True)
    ]
