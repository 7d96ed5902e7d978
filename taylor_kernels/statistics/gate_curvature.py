"""The curvature of gates: how the loss bends as a channel is turned down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.statistics.gates import _Gates
from taylor_kernels.statistics.hooks.closure import FromOutput, check_examples
from taylor_kernels.statistics.layers import held_weight
from taylor_kernels.statistics.output_curvature import FEW_OUTPUTS, curvature_root, sign_probe
from taylor_kernels.statistics.registry import register_statistic

#: Few columns of the curvature's root have a backward pass each, and the result is exact; of more,
#: so many random combinations have one. A single one ranked filters nearly as all do.
_PROBES = 8


@register_statistic
class GateCurvature(FromOutput, _Gates):
    """[F, 1 + N·K] per layer: s = ∂L/∂gate, then ∂/∂gate of N·K numbers whose squares sum to h.

    The gate multiplies the whole output, behind the channel's norms if it has any, so that 0
    removes the filter, as the oracle does: L changes by −s + ½h, h the gate's diagonal element of
    the Gauss-Newton matrix. The numbers are K combinations of an example's
    outputs, weighed by the loss; of gates that are turned together they add up, as s does, which
    their curvatures do not. A layer used twice has one gate. Exact in eval mode; a BatchNorm in
    train mode behind a gate mixes examples, and h is then made of what each example's gate does
    to the outputs of all.
    """

    name = "gate_curvature"
    columns = "1 + n: the gate's gradient; numbers whose squares sum to its curvature"
    reads = "closure"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._batch = 0
        self._at_loss = False
        self._received: dict[str, Tensor] = {}  # [N, F], of one backward pass

    def _tables_at(self, loss: Tensor, output: Tensor) -> list[Tensor]:
        self._batch = output.size(0)
        root = curvature_root(loss, output)
        self._at_loss = True
        slopes = self._gates_of(loss, None)
        self._at_loss = False
        tables = {name: [slope.sum(0)[None]] for name, slope in slopes.items()}
        for column in self._columns(root):
            gates = self._gates_of(output, column.view_as(output).to(output))
            for name, table in tables.items():
                table.append(gates[name])
        joined = {name: torch.cat(table).T for name, table in tables.items()}
        return self._gate_tables.finish(joined, self.model.training)

    def _watches_noise(self) -> bool:
        return self._at_loss and super()._watches_noise()

    def _columns(self, root: Tensor) -> Iterator[Tensor]:
        """What is to flow back from the output, so that squares of gate gradients sum to h."""
        if root.size(2) <= FEW_OUTPUTS:
            yield from root.unbind(2)
            return
        generator = self._generator()
        for _ in range(_PROBES):
            yield sign_probe(root, generator) / _PROBES**0.5

    def _gates_of(self, tensor: Tensor, gradient: Tensor | None) -> Mapping[str, Tensor]:
        """[N, C] of all that is watched: gate gradients of one backward pass."""
        self._received = {}
        self._backward(tensor, gradient)
        like = held_weight(next(iter(self.layers.values())))
        return {
            name: self._received[name]
            if name in self._received
            else like.new_zeros(self._batch, width, dtype=torch.float32)
            for name, width in self._gate_tables.widths.items()
        }

    def _receive(self, name: str, module: nn.Module, gates: Tensor, pass_: int) -> None:
        check_examples(name, gates.size(0), self._batch)
        known = self._received.get(name)
        self._received[name] = gates if known is None else known + gates

    def discard(self) -> None:
        super().discard()
        self._received = {}
