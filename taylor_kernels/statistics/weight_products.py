"""The Hessian of all scored weights times one vector, and what is made of it per filter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taylor_kernels.ops.hutchinson_moments import hutchinson_moments
from taylor_kernels.ops.rademacher import rademacher_like
from taylor_kernels.ops.second_order_moments import second_order_sums
from taylor_kernels.statistics.base import Closure, Statistic
from taylor_kernels.statistics.hessian_product import gradient_and_product, twice_differentiable
from taylor_kernels.statistics.hooks.closure import differentiating, run_closure
from taylor_kernels.statistics.layers import Rows, check_leaf, rows_of
from taylor_kernels.statistics.registry import register_statistic


class _WeightProducts(Statistic):
    """Runs the closure, and takes ∂L/∂W and H·V over the weights of all layers.

    No other parameter requires a gradient meanwhile, and frozen weights do. A weight that several
    layers share is one parameter, and each of them gets a table of its own filters in it.
    """

    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        assert closure is not None
        place: dict[Tensor, int] = {}  # of each weight, among all
        every: list[list[Rows]] = []  # of each layer
        for name, layer in self.layers.items():
            check_leaf(name, layer)
            every.append(rows_of(layer))
            for rows in every[-1]:
                place.setdefault(rows.parameter, len(place))
        weights = list(place)
        values = [weight.detach() for weight in weights]
        with differentiating(), _only_gradients_of(self.model, weights), twice_differentiable():
            loss = run_closure(closure)
            products = _Products(
                values, *gradient_and_product(loss, weights, self._vectors(values))
            )
        # A convolution and its transpose, as in a tied autoencoder, see other filters in a weight.
        kinds = [
            [_Kind(place[one.parameter], one.axis, one.groups, one.merged) for one in rows]
            for rows in every
        ]
        tables: dict[_Kind, Tensor] = {}
        for axis in (0, 1):
            seen = dict.fromkeys(kind for of_layer in kinds for kind in of_layer)
            chosen = [kind for kind in seen if kind.axis == axis]
            if chosen:
                places, groups = [kind.place for kind in chosen], [kind.groups for kind in chosen]
                found = self._reduce(products.of(chosen), places, axis, groups)
                tables |= zip(chosen, found, strict=True)
        self.updates += 1
        sums = [[tables[kind] for kind in of_layer] for of_layer in kinds]
        return [parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in sums]

    @abstractmethod
    def _vectors(self, weights: list[Tensor]) -> list[Tensor]:
        """What the Hessian is multiplied by."""

    @abstractmethod
    def _reduce(
        self, products: _Products, places: list[int], axis: int, groups: list[int]
    ) -> list[Tensor]:
        """[F, K] tables of those weights; `places` are theirs among all weights."""


class _Kind(NamedTuple):
    """A way to see filters in a weight: its place among all, and what `Rows` says of it."""

    place: int
    axis: int
    groups: int
    merged: int


class _Products(NamedTuple):
    """Of each weight: its values, ∂L/∂W, H·V."""

    weights: list[Tensor]
    grads: list[Tensor]
    hvps: list[Tensor]

    def of(self, kinds: list[_Kind]) -> _Products:
        """Those of some weights, as matrices of these kinds."""

        def seen(tensors: list[Tensor], kind: _Kind) -> Tensor:
            return Rows(tensors[kind.place], *kind[1:]).of(tensors[kind.place])

        return _Products(*([seen(tensors, kind) for kind in kinds] for tensors in self))


@register_statistic
class SecondOrder(_WeightProducts):
    """[F, 2] per layer: Σ q and Σ q² over weights, q = g·w − ½·w·(HW) with W all scored weights."""

    name = "weight_products"
    columns = "2: Σ q, Σ q² with q = g·w − ½·w·(HW), W all scored weights"
    reads = "closure"
    reads_bare = True

    def _vectors(self, weights: list[Tensor]) -> list[Tensor]:
        return weights

    def _reduce(
        self, products: _Products, places: list[int], axis: int, groups: list[int]
    ) -> list[Tensor]:
        return second_order_sums(*products, dim=axis, groups=groups, backend=self.backend)


@register_statistic
class Hutchinson(_WeightProducts):
    """[F, 1] per layer: Σ w² z (Hz), random signs z; its mean over updates is Σ_k w_k² H_kk.

    The signs are those of the update's number, so they need no memory and a resumed meter draws
    the ones it would have drawn.
    """

    name = "hutchinson"
    columns = "1: Σ w² z (Hz), random signs z drawn anew at every update"
    reads = "closure"
    reads_bare = True
    across_ranks = "sum"
    same_draws = True

    def _vectors(self, weights: list[Tensor]) -> list[Tensor]:
        return rademacher_like(weights, seed=self.updates, backend=self.backend)

    def _reduce(
        self, products: _Products, places: list[int], axis: int, groups: list[int]
    ) -> list[Tensor]:
        tables = hutchinson_moments(
            products.weights,
            products.hvps,
            seed=self.updates,
            streams=places,
            dim=axis,
            groups=groups,
            backend=self.backend,
        )
        return [table[:, None] for table in tables]


@contextmanager
def _only_gradients_of(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
