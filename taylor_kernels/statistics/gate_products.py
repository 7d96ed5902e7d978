"""The Hessian of all gates at once: how the loss bends when every channel is turned down."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.layout import accumulator
from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.hessian_product import gradient_and_product, twice_differentiable
from taylor_kernels.statistics.hooks.closure import InClosure, run_closure
from taylor_kernels.statistics.hooks.following_norms import FollowingNorms
from taylor_kernels.statistics.hooks.gate_tables import GateTables
from taylor_kernels.statistics.hooks.passes import inside_backward
from taylor_kernels.statistics.hooks.sites import ELSEWHERE, change_at
from taylor_kernels.statistics.layers import Layer, channel_dim, check_output, held_weight
from taylor_kernels.statistics.registry import register_statistic


@register_statistic
class GateProducts(InClosure):
    """[F, 1] per layer: q = s − ½ H1, with s and H the loss's gradient and Hessian in all gates.

    Gates are factors of 1 in the closure's passes, behind the channel's norms if it has any.
    Over coupled filters, which share a gate, q adds up.
    """

    name = "gate_products"
    columns = "1: s − ½ H1 of all gates: their gradient, their Hessian's row sums"
    reads = "closure"
    across_ranks = "sum"
    at_gates = True

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        followed = self.layers if self.sites is None else {}
        self._norms = FollowingNorms(self.model, followed, None, self._on_norm)
        self._gate_tables = GateTables(self.layers, self.sites)
        sites = () if self.sites is None else self.sites.sites
        self._active = {site.key: site.classes != ELSEWHERE for site in sites}
        self._gates: list[tuple[str, Tensor]] = []  # of all uses of layers, in order
        self._by_output: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # where they are
        self._replaced: set[int] = set()  # by one behind a norm
        self._followed: str | None = None  # the layer before the norm that has just run

    def _tables_of(self, closure: Closure) -> list[Tensor]:
        handles = self._hooks()
        try:
            with twice_differentiable():
                loss = run_closure(closure)
                used = [use for i, use in enumerate(self._gates) if i not in self._replaced]
                if not used:
                    raise RuntimeError("closure: it called none of the layers to be scored")
                gates = [gate for _, gate in used]
                slopes, products = gradient_and_product(
                    loss, gates, [self._turned(*use) for use in used]
                )
        finally:
            remove_all(handles)
            self._gates, self._by_output, self._replaced = [], {}, set()
        like = held_weight(next(iter(self.layers.values())))
        tables = {
            name: like.new_zeros(width, 1, dtype=accumulator(like.dtype))
            for name, width in self._gate_tables.widths.items()
        }
        for (name, _), s, h in zip(used, slopes, products, strict=True):
            tables[name] = tables[name] + (s - h / 2)[:, None]
        return self._gate_tables.finish(tables, self.model.training)

    def _hooks(self) -> list[RemovableHandle]:
        if self.sites is not None:
            return [
                handle
                for site in self.sites.sites
                for handle in change_at(
                    self.model, site, partial(self._gated, site.key, dim=site.dim)
                )
            ]
        # Before all other hooks, so that a norm and they are handed what is multiplied.
        handles = [
            layer.register_forward_hook(Hook(self._gate_layer, name), prepend=True)
            for name, layer in self.layers.items()
        ]
        return handles + [
            module.register_forward_hook(Hook(self._gate_norm))
            for module in self.model.modules()
            if isinstance(module, _NormBase)
        ]

    def _turned(self, name: str, gate: Tensor) -> Tensor:
        """1 for each gate that stands here, 0 for the others."""
        return self._active[name].to(gate) if name in self._active else torch.ones_like(gate)

    @property
    def noise(self) -> list[str]:
        return list(self._gate_tables.noise.layers)

    def close(self) -> None:
        self._norms.close()
        super().close()

    def _gate_layer(self, name: str, layer: Layer, _: tuple, output: object) -> Tensor | None:
        return self._gated(name, check_output(name, output), channel_dim(layer))

    def _on_norm(self, name: str | None, norm: _NormBase, input: Tensor, output: Tensor) -> None:
        known, number = self._by_output.get(id(input), (None, 0))
        if known is not None and known() is input and name is not None:
            self._replaced.add(number)
        self._followed = name

    def _gate_norm(self, norm: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
        return None if self._followed is None else self._gated(self._followed, output, 1)

    def _gated(self, name: str, output: Tensor, dim: int) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        extents = [1] * output.dim()
        extents[dim] = -1
        gate = torch.ones(
            output.size(dim), dtype=accumulator(output.dtype), device=output.device
        ).requires_grad_()
        gated = output * gate.to(output.dtype).view(extents)
        self._awaits_gradient(name, gated)
        if not inside_backward():  # where a checkpoint computes the same use again
            if self._gate_tables.noise.watches and gated.requires_grad:
                self._look_for_noise(name, gated, dim % gated.dim())
            self._by_output[id(gated)] = (weakref.ref(gated), len(self._gates))
            self._gates.append((name, gate))
        return gated

    def _look_for_noise(self, name: str, gated: Tensor, dim: int) -> None:
        number, y = len(self._gates), gated.detach()
        seen = False

        def on_gradient(dy: Tensor) -> None:
            nonlocal seen
            if seen or number in self._replaced:
                return
            seen = True  # and not what comes when the gradient is differentiated
            self._gate_tables.noise.add(name, y, dy, dim)

        gated.register_hook(on_gradient)
