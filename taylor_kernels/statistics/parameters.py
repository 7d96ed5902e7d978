"""Statistics read off weights and their gradients alone; only streamed gradients need hooks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taylor_kernels.ops.filter_moments import MOMENTS, needed_moments
from taylor_kernels.shards import is_sharded, local_part, offsets, part_count, rows_in_whole
from taylor_kernels.statistics.base import Closure, Statistic
from taylor_kernels.statistics.hooks.streaming import GradientStream
from taylor_kernels.statistics.layers import (
    Layer,
    Layers,
    Rows,
    check_leaf,
    filter_axis,
    filter_count,
    filter_groups,
    held_weight,
    rows_of,
    used_weight,
)
from taylor_kernels.statistics.parts import BareLayer
from taylor_kernels.statistics.registry import register_statistic

#: A layer, and one of its parameters.
_Number = tuple[int, int]
#: Of g in each of `MOMENTS`.
_POWERS = (1.0, 2.0, 1.0, 0.0, 2.0)


class _OfWeights(Statistic):
    """Sums over the elements of weights, which may lie on several ranks."""

    @property
    def spread(self) -> list[int] | None:
        weights = [held_weight(layer) for layer in self.layers.values()]
        return [*map(part_count, weights)] if any(map(is_sharded, weights)) else None

    @staticmethod
    def _whole_rows(layer: Layer, rows: Rows, table: Tensor) -> Tensor:
        """The table of a part of a layer's weight, with a row for every filter of the layer."""
        if not is_sharded(rows.parameter):
            return table
        if rows.merged > 1:
            raise ValueError(
                "model: a stack of weights, with the filters in its last dimension, is on several "
                "ranks, where they cannot be told apart; leave it out, or do not shard it"
            )
        if rows.axis and rows.groups > 1:
            raise ValueError(
                "model: a grouped transposed convolution has its weight on several ranks, where "
                "its filters cannot be told apart; leave it out, or do not shard it"
            )
        return rows_in_whole(table, offsets(rows.parameter)[rows.axis], filter_count(layer))


@register_statistic
class WeightMoments(_OfWeights):
    """The moments of every layer's weight and its gradient, all layers in one launch.

    A layer that the backward pass did not reach has no gradient: its moments are those of a
    gradient of zero in every column but w2.

    Streamed, a weight's moments are taken as its gradient comes, a launch for each: the bits of a
    table do not depend on what else is in the launch.
    """

    name = "moments"
    columns = "5, those of `MOMENTS`: Σ gw, Σ (gw)², Σ abs(gw), Σ w², Σ g²"
    reads = "weight gradients"
    reads_bare = True
    shared_columns = len(MOMENTS)
    streams = True

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        super().__init__(model, layers, backend)
        self._scored: list[tuple[weakref.ref[Tensor], int]] = []
        self._powers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._listed = list(layers.values())
        self._streamed: dict[_Number, Tensor] = {}
        self._places: dict[Tensor, dict[_Number, Rows]] = {}

    def start_stream(self, *, watch: bool) -> None:
        for number, rows in self._rows().items():
            self._places.setdefault(rows.parameter, {})[number] = rows
        self.stream = GradientStream(self.model, self._take, watch=watch)

    def _rows(self) -> dict[_Number, Rows]:
        """The parameters of all layers as they are now."""
        found: dict[_Number, Rows] = {}
        for number, (name, layer) in enumerate(self.layers.items()):
            check_leaf(name, layer)
            found.update(((number, part), rows) for part, rows in enumerate(rows_of(layer)))
        return found

    def _take(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        grad, places = parameter.grad.detach(), self._places.get(parameter, {})
        self._streamed |= self._moments({number: (rows, grad) for number, rows in places.items()})

    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        found = self._moments(self._pairs()) if self.stream is None else self._came()
        tables = [found[number, 0] for number in range(len(self.layers))]
        for number, part in sorted(found):
            if part:
                tables[number] = tables[number] + found[number, part]
        if loss_scale != 1.0:
            tables = [t / loss_scale ** self._powers_like(t) for t in tables]
        return tables

    def _moments(self, pairs: Mapping[_Number, tuple[Rows, Tensor]]) -> dict[_Number, Tensor]:
        """The tables of parameters, by number, from the rows and the gradient of each."""
        tables = {}
        for axis in (0, 1):  # 1: transposed convolutions, and GPT-2's linear layers
            chosen = {number: pair for number, pair in pairs.items() if pair[0].axis == axis}
            if not chosen:
                continue
            moments = needed_moments(
                [rows.of(local_part(rows.parameter.detach())) for rows, _ in chosen.values()],
                [rows.of(local_part(grad)) for rows, grad in chosen.values()],
                dim=axis,
                groups=[rows.groups for rows, _ in chosen.values()],
                moments=self.moments,
                backend=self.backend,
            )
            for (number, (rows, _)), table in zip(chosen.items(), moments, strict=True):
                tables[number] = self._whole_rows(self._listed[number[0]], rows, table)
        return tables

    def _came(self) -> dict[_Number, Tensor]:
        """The tables of a pass whose gradients were streamed."""
        rows = self._trained_rows()
        for number, one in rows.items():
            if one.parameter.grad is not None:
                raise RuntimeError(
                    f"stream: {self._named(number)} has a gradient that was not streamed: it is "
                    "another parameter than when the meter was made, or the gradient is older than "
                    "that; call zero_grad(set_to_none=True), and make a new meter of a changed "
                    "model"
                )
        if not self._streamed:
            raise RuntimeError(
                "stream: no layer's gradient came since the last update(); call it once after each "
                "loss.backward()"
            )
        found, self._streamed = self._streamed, {}
        assert self.stream is not None
        self.stream.clear()
        for number, one in rows.items():  # one after another: each needs a gradient
            if number not in found:
                found |= self._moments({number: (one, torch.zeros_like(one.parameter))})
        return found

    def _named(self, number: _Number) -> str:
        """What messages call a parameter."""
        name, layer = list(self.layers.items())[number[0]]
        return name if isinstance(layer, BareLayer) else f"{name}.weight"

    def is_finite(self, table: Tensor) -> Tensor:
        if self.moments is None:
            return super().is_finite(table)
        # Column by column: a list of indices would be copied from the host to the table's device.
        columns = [table[:, MOMENTS.index(name)] for name in self.moments]
        return torch.stack([column.isfinite().all() for column in columns]).all()

    def discard(self) -> None:
        if self.stream is not None:
            self._streamed = {}
            self.stream.clear()

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def _powers_like(self, table: Tensor) -> Tensor:
        """The power of the loss scale that each moment holds.

        It is kept on each device: a copy there, for each layer of each minibatch, would make the
        host wait for the device.
        """
        key = table.device, table.dtype
        if key not in self._powers:
            self._powers[key] = torch.tensor(_POWERS, dtype=table.dtype, device=table.device)
        return self._powers[key]

    def _trained_rows(self) -> dict[_Number, Rows]:
        """`_rows`, of which every parameter is trained."""
        found = self._rows()
        for number, rows in found.items():
            if not rows.parameter.requires_grad:
                raise RuntimeError(
                    f"{self._named(number)} requires no gradient, so this criterion has nothing to "
                    "read; inside tk.scoring() or with frozen layers use taylor_fo_gate or "
                    "taylor_fo_bn"
                )
        return found

    def _pairs(self) -> dict[_Number, tuple[Rows, Tensor]]:
        """Each parameter's rows and its gradient, zeros where there is none."""
        found = self._trained_rows()
        grads = [rows.parameter.grad for rows in found.values()]
        present = [grad for grad in grads if grad is not None]
        if not present:
            raise RuntimeError(
                "no layer has a gradient; score after loss.backward() and before "
                "optimizer.step() and zero_grad()"
            )
        if self._scored and all(
            reference() is grad and version == grad._version
            for grad, (reference, version) in zip(present, self._scored, strict=False)
        ):
            raise RuntimeError(
                "the gradients are those that were scored last; score once after each "
                "loss.backward()"
            )
        self._scored = [(weakref.ref(grad), grad._version) for grad in present]
        return {
            number: (rows, torch.zeros_like(rows.parameter) if grad is None else grad.detach())
            for (number, rows), grad in zip(found.items(), grads, strict=True)
        }


@register_statistic
class Magnitudes(_OfWeights):
    """Σ abs(w) and Σ w² of every filter."""

    name = "magnitudes"
    columns = "2: Σ abs(w), Σ w²"
    reads = "weights"
    reads_bare = True
    shared_columns = 2

    @torch.no_grad()
    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        return [self._table(layer) for layer in self.layers.values()]

    def _table(self, layer: Layer) -> Tensor:
        if isinstance(layer, BareLayer):
            return torch.stack([self._sums(layer, rows) for rows in rows_of(layer)]).sum(0)
        return self._sums(layer, Rows(used_weight(layer), filter_axis(layer), filter_groups(layer)))

    def _sums(self, layer: Layer, rows: Rows) -> Tensor:
        weight = rows.of(local_part(rows.parameter.detach()))
        if rows.axis:  # [in, out / groups, ...] -> filters first
            weight = weight.unflatten(0, (rows.groups, -1)).transpose(1, 2).flatten(0, 1)
        flat = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
        dtype = torch.promote_types(flat.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(flat, p, dim=1, dtype=dtype) for p in (1, 2)]
        return self._whole_rows(layer, rows, torch.stack((norms[0], norms[1].square()), 1))
