"""What a meter keeps of all minibatches: sums over observations, and how many those were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion

_STATE_VERSION = 1


class Observed(NamedTuple):
    """Of the scores of a minibatch, or of several.

    Attributes:
        total: over the observations of each filter, [F] float64.
        squares: of them, summed, [F] float64.
        counts: observations of each layer.
    """

    total: Tensor
    squares: Tensor
    counts: list[int]


class Totals:
    """Sums over all observations so far, from which a mean and its error come.

    Args:
        sizes: layer -> filters.

    Attributes:
        updates: minibatches that count.
    """

    def __init__(self, criterion: Criterion, sizes: Mapping[str, int]) -> None:
        self._criterion = criterion
        self._sizes = dict(sizes)
        total = sum(sizes.values())
        self._sum = torch.zeros(total, dtype=torch.float64)
        self._sum_squares = torch.zeros(total, dtype=torch.float64)
        self._counts = [0] * len(sizes)
        self.updates = 0

    def observed(self, tables: list[Tensor], unread: frozenset[str]) -> Observed:
        """The scores of a minibatch, which is not added yet.

        Args:
            tables: of the layers, in their order.
            unread: layers for which it was no observation.
        """
        device = tables[0].device
        if len({table.size(1) for table in tables}) == 1:
            tables = [torch.cat([table.to(device) for table in tables])]
        scores = [self._criterion.observations(table.to(device)) for table in tables]
        total = torch.cat([s.sum(1, dtype=torch.float64) for s in scores])
        squares = torch.cat([s.double().square().sum(1) for s in scores])
        counts = [s.size(1) for s in scores]
        counts *= len(self._sizes) if len(counts) == 1 else 1
        if unread:
            read = [name not in unread for name in self._sizes]
            of_filters = torch.tensor(read).repeat_interleave(torch.tensor([*self._sizes.values()]))
            total, squares = (t.where(of_filters.to(device), 0.0) for t in (total, squares))
            counts = [n * here for n, here in zip(counts, read, strict=True)]
        return Observed(total, squares, counts)

    def add(self, seen: Observed, updates: int) -> None:
        """Observations of so many minibatches."""
        self._sum = self._sum.to(seen.total.device) + seen.total
        self._sum_squares = self._sum_squares.to(seen.total.device) + seen.squares
        self._counts = [old + new for old, new in zip(self._counts, seen.counts, strict=True)]
        self.updates += updates

    def mean(self) -> dict[str, Tensor]:
        """{layer: [filters] float32}; nan for a layer that was never observed."""
        return self._per_layer(self._sum / self._counts_per_filter())

    def standard_error(self) -> dict[str, Tensor]:
        """sqrt(sample variance / observations), as mean() gives it; nan of one observation."""
        n = self._counts_per_filter()
        mean = self._sum / n
        variance = (self._sum_squares / n - mean.square()).clamp_min(0) * n / (n - 1)
        return self._per_layer((variance / n).sqrt().where(n > 1, math.nan))

    def state_dict(self) -> dict[str, Any]:
        """What load() goes on from: sums, counts, and what they belong to."""
        return {
            "version": _STATE_VERSION,
            "criterion": self._criterion.name,
            "filters": dict(self._sizes),
            "sum": self._sum.clone(),
            "sum_squares": self._sum_squares.clone(),
            "counts": list(self._counts),
            "updates": self.updates,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """A state is one of the same criterion on the same layers.

        Raises:
            ValueError: it is not.
        """
        expected = self.state_dict()
        if not isinstance(state, dict) or state.keys() != expected.keys():
            raise ValueError("state: not a state_dict of tk.Importance")
        for key in ("version", "criterion", "filters"):
            if state[key] != expected[key]:
                raise ValueError(
                    f"state: its {key} is {state[key]!r}, this meter's is {expected[key]!r}"
                )
        for key in ("sum", "sum_squares"):
            if not isinstance(state[key], Tensor) or state[key].shape != expected[key].shape:
                raise ValueError(f"state: {key} does not hold one number per filter")
        counts, updates = state["counts"], state["updates"]
        if not isinstance(counts, list) or len(counts) != len(self._sizes):
            raise ValueError("state: counts does not hold one number per layer")
        if any(type(n) is not int or n < 0 for n in (*counts, updates)):
            raise ValueError("state: counts and updates are not whole numbers from 0 on")

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that has been checked."""
        self._sum = state["sum"].double().clone()
        self._sum_squares = state["sum_squares"].double().clone()
        self._counts = list(state["counts"])
        self.updates = state["updates"]

    def _counts_per_filter(self) -> Tensor:
        counts = torch.tensor(self._counts, dtype=torch.float64)
        sizes = torch.tensor(list(self._sizes.values()))
        return counts.repeat_interleave(sizes).to(self._sum.device)

    def _per_layer(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.float().split(list(self._sizes.values()))
        return dict(zip(self._sizes, parts, strict=True))
