"""The oracle's statistic: how the loss changes when a filter really is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from taylor_kernels.sources.base import filter_count
from taylor_kernels.sources.following_norms import KnowsNorms


class LossChange(KnowsNorms):
    """[F, 1] per layer: loss without the filter − loss with it, one evaluation per filter.

    The filter's channel is set to 0 behind its BatchNorm if one follows, else at its own output,
    with the model in eval mode, so that no running statistic moves; the mode is restored.
    """

    @torch.no_grad()
    def collect(
        self, *, loss_scale: float = 1.0, closure: Callable[[], Tensor] | None = None
    ) -> list[Tensor]:
        if closure is None:
            raise ValueError(
                "closure: the oracle evaluates the loss itself; call "
                "update(closure=lambda: loss_fn(model(x), y))"
            )
        tables = [
            torch.empty(filter_count(layer), 1, dtype=torch.float64)
            for layer in self.layers.values()
        ]
        work = [(i, c) for i, table in enumerate(tables) for c in range(len(table))]
        names = list(self.layers)
        with _eval_mode(self.model):
            base = float(closure())
            console = Console(stderr=True)
            for i, c in track(
                work,
                "oracle: removing filters",
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ):
                with self._removed(names[i], c):
                    tables[i][c] = float(closure()) - base
        devices = [layer.weight.device for layer in self.layers.values()]
        return [t.float().to(device) for t, device in zip(tables, devices, strict=True)]

    @contextmanager
    def _removed(self, name: str, channel: int) -> Iterator[None]:
        layer = self.layers[name]
        dim = -1 if isinstance(layer, nn.Linear) else -len(layer.kernel_size) - 1

        def zero(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            return output.index_fill(dim, torch.tensor(channel, device=output.device), 0)

        gated: list[nn.Module] = [*self._norms.of(name)] or [layer]
        handles = [module.register_forward_hook(zero) for module in gated]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
