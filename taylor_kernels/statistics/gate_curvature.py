"""The curvature of gates: how the loss bends as a channel is turned down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taylor_kernels.statistics.gates import GateStatistic
from taylor_kernels.statistics.hooks.closure import FromOutput, check_examples
from taylor_kernels.statistics.hooks.loss_inputs import LossFunction
from taylor_kernels.statistics.layers import held_weight
from taylor_kernels.statistics.output_curvature import (
    Columns,
    exact_columns,
    sampled_columns,
    warn_if_linear,
)
from taylor_kernels.statistics.registry import register_statistic


@register_statistic
class GateCurvature(FromOutput, GateStatistic):
    """[F, 1 + 2n] per layer: s = ∂L/∂gate, then slopes a_1..a_n and ±a_1..±a_n with Σ ± a² = h.

    The gate multiplies the whole output, behind the channel's norms if it has any, so that 0
    removes the filter, as the oracle does: L changes by −s + ½h, h the gate's diagonal element of
    the Gauss-Newton matrix. The numbers are slopes of combinations of an example's outputs, weighed
    by the loss; of gates that are turned together they add up, as s does, which their curvatures do
    not. A layer used twice has one gate.

    `passes` backward passes more than for s have h as their expectation. Of a classifier's
    cross-entropy the label's share comes of s itself; the last pass is a random combination of the
    other classes, those before it take the likeliest of them, one each. What cannot be told apart
    by examples (dim 0 of what the loss reads), as where a layer is given tokens or a loss compares
    examples, is squared in sum, with the same expectation and more variance. A loss that bends
    downwards somewhere may have h below 0.

    In eval mode examples are apart in the model; a BatchNorm in train mode behind a gate mixes
    them, and h is then made of what each example's gate does to the outputs of all.
    """

    name = "gate_curvature"
    columns = "1 + 2n: the gate's gradient; 2 · n numbers, Σ of their products its curvature"
    reads = "closure"
    across_ranks = "sum"
    shared_columns = 2
    #: Backward passes beside that for s; None for as many as make it exact. One ranked filters as
    #: all do on the study's networks (Spearman to 0.0002), and further ones a half step each.
    passes: ClassVar[int | None] = 1

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._at_loss = False
        self._received: dict[str, Tensor] = {}  # [N, F], of one backward pass

    def _tables_at(self, loss: LossFunction) -> list[Tensor]:
        warn_if_linear(loss, stacklevel=7)
        self._at_loss = True
        slopes = self._gates_of(loss, loss.slopes)
        self._at_loss = False
        factor = self._factor(loss, slopes)
        rows = loss.examples if factor.apart and loss.examples is not None else 1
        found = [(self._filled(slopes, rows, factor.apart), factor.of_slope)]
        tables = {name: [slope.sum(0)[None]] for name, slope in found[0][0].items()}
        signs = []
        columns: dict[str, list[Tensor]] = {name: [] for name in tables}
        if factor.of_slope is not None:
            signs.append(1)
            for name, slope in found[0][0].items():
                columns[name].append(slope * factor.of_slope.to(slope)[:, None])
        for vectors, sign in factor.columns:
            gates = self._filled(self._gates_of(loss, vectors), rows, factor.apart)
            signs.append(sign)
            for name, parts in columns.items():
                parts.append(gates[name])
        joined = {
            name: torch.cat(
                [*tables[name], *parts, *(s * part for s, part in zip(signs, parts, strict=True))]
            ).T
            for name, parts in columns.items()
        }
        return self._gate_tables.finish(joined, self.model.training)

    def _factor(self, loss: LossFunction, slopes: Mapping[str, Tensor]) -> Columns:
        """What is to flow back from what the loss reads, so that gate gradients make h."""
        batch = loss.examples
        if self.passes is None:
            factor = exact_columns(loss)
            for name, slope in slopes.items():
                check_examples(name, slope.size(0), batch or 0)
            return factor
        apart = all(slope.size(0) == batch for slope in slopes.values())
        return sampled_columns(loss, self.passes, self.updates, apart=apart)

    @classmethod
    def shared(cls, table: Tensor) -> Tensor:
        """s and h: slopes of the examples of different ranks do not meet."""
        slopes, signed = table[:, 1:].chunk(2, 1)
        return torch.stack((table[:, 0], (slopes * signed).sum(1)), 1)

    @classmethod
    def unshared(cls, columns: Tensor) -> Tensor:
        return torch.cat((columns, torch.ones_like(columns[:, :1])), 1)

    def _watches_noise(self) -> bool:
        return self._at_loss and super()._watches_noise()

    def _gates_of(self, loss: LossFunction, vectors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """[N, C] of all that a backward pass reached: gate gradients, examples apart."""
        self._received = {}
        self._backward(loss, vectors)
        return self._received

    def _filled(self, gates: Mapping[str, Tensor], rows: int, apart: bool) -> dict[str, Tensor]:
        """[rows, C] of all that is watched; a sum over examples where they are not apart."""
        like = held_weight(next(iter(self.layers.values())))
        return {
            name: (gates[name] if apart else gates[name].sum(0, keepdim=True))
            if name in gates
            else like.new_zeros(rows, width, dtype=torch.float32)
            for name, width in self._gate_tables.widths.items()
        }

    def _receive(self, name: str, module: nn.Module, gates: Tensor, pass_: int) -> None:
        known = self._received.get(name)
        if known is not None:
            if len(known) != len(gates):  # then they have no examples in common
                known, gates = known.sum(0, keepdim=True), gates.sum(0, keepdim=True)
            gates = known + gates
        self._received[name] = gates

    def discard(self) -> None:
        super().discard()
        self._received = {}


@register_statistic
class ExactGateCurvature(GateCurvature):
    """The same, a column for each direction in which the loss bends, so that h is exact.

    Up to 1,024 outputs per example, which the loss must keep apart.
    """

    name = "gate_curvature_exact"
    columns = "1 + 2n: the same, exact"
    passes = None
