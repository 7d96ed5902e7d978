"""A score that says nothing: the control of every comparison of criteria."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taylor_kernels.statistics.base import Closure, Statistic
from taylor_kernels.statistics.layers import Layers, filter_count, held_weight
from taylor_kernels.statistics.registry import register_statistic


@register_statistic
class Random(Statistic):
    """A fixed uniform draw per filter, from a generator of its own: PyTorch's stays untouched."""

    name = "random"
    columns = "1: uniform in [0, 1), drawn once"
    reads = "weights"
    reads_bare = True
    drawn = True
    same_draws = True

    seed = 0

    @classmethod
    @contextmanager
    def seeded(cls, seed: int) -> Iterator[None]:
        """Inside, what is made draws from this seed: to compare with several draws."""
        before, cls.seed = cls.seed, seed
        try:
            yield
        finally:
            cls.seed = before

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        super().__init__(model, layers, backend)
        generator = torch.Generator().manual_seed(self.seed)
        self._draws = [
            torch.rand(filter_count(layer), 1, generator=generator).to(held_weight(layer).device)
            for layer in layers.values()
        ]

    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        return self._draws
