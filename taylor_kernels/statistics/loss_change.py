"""The oracle's statistic: how the loss changes when a filter really is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import SupportsFloat

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.hooks.following_norms import KnowsNorms
from taylor_kernels.statistics.hooks.sites import GateSites, change_at
from taylor_kernels.statistics.layers import channel_dim, eval_mode, filter_count, held_weight
from taylor_kernels.statistics.registry import register_statistic

#: A filter: the name of its layer and its number in it.
Filter = tuple[str, int]


@register_statistic
class LossChange(KnowsNorms):
    """[F, 1] per layer: loss without the filter − loss with it, one evaluation per filter.

    The filter's channel is set to 0 where its gate stands, with the model in eval mode, so that no
    running statistic moves; the mode is restored. That is at the gate's sites, and without sites
    behind the norm that follows, or at its own output.
    """

    name = "loss_change"
    columns = "1: loss without the filter − loss with it"
    reads = "closure"
    across_ranks = "sum"
    prunable = False
    at_gates = True

    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        assert closure is not None
        tables = {
            name: torch.empty(filter_count(layer), 1, device=held_weight(layer).device)
            for name, layer in self.layers.items()
        }
        filters = [(name, number) for name, table in tables.items() for number in range(len(table))]
        from rich.console import Console  # nothing else that a score needs is not PyTorch
        from rich.progress import track

        console = Console(stderr=True)
        for (name, number), change in track(
            self.changes(closure, filters),
            "oracle: removing filters",
            total=len(filters),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            tables[name][number] = change
        return list(tables.values())

    def changes(
        self, closure: Callable[[], Tensor | float], filters: Iterable[Filter]
    ) -> Iterator[tuple[Filter, float]]:
        """Loss without a filter − loss with all, for one filter after the other, as it is asked.

        The loss with all is evaluated first, once. Between two filters the model is as it was.
        """
        with eval_mode(self.model), torch.no_grad():
            base = _number(closure())
        for filter_ in filters:
            with eval_mode(self.model), torch.no_grad(), self.removed([filter_]):
                change = _number(closure()) - base
            yield filter_, change

    @contextmanager
    def removed(self, filters: Iterable[Filter]) -> Iterator[None]:
        """Inside, these filters are not there, and nothing of them is trained.

        Before, the model must have run once, which shows what norm follows a layer.
        """
        numbers: dict[str, list[int]] = {}
        for name, number in filters:
            numbers.setdefault(name, []).append(number)
        if self.sites is not None:
            classes = [self.sites.layers[name][gone] for name, gone in numbers.items()]
            handles = self._zeroed_at(self.sites, torch.cat(classes)) if classes else []
        else:
            handles = []
            for name, gone in numbers.items():
                layer = self.layers[name]
                gated: list[nn.Module] = [*self._norms.of(name)] or [layer]
                zeroing = _zeroing(channel_dim(layer), gone, held_weight(layer).device)
                handles += [
                    module.register_forward_hook(lambda _, __, y, zeroing=zeroing: zeroing(y))
                    for module in gated
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _zeroed_at(self, sites: GateSites, classes: Tensor) -> list[RemovableHandle]:
        """Hooks that set the channels of these classes to 0 at all their sites."""
        handles: list[RemovableHandle] = []
        for site in sites.sites:
            channels = torch.isin(site.classes, classes).nonzero().flatten().tolist()
            if not channels:
                continue
            device = held_weight(next(iter(self.layers.values()))).device
            handles += change_at(self.model, site, _zeroing(site.dim, channels, device))
        return handles


def _number(loss: object) -> float:
    """What a closure returned, as a number.

    Raises:
        TypeError: it is none.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.item()
    if isinstance(loss, SupportsFloat) and not isinstance(loss, Tensor):
        return float(loss)
    what = f"{tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else repr(loss)
    raise TypeError(
        f"closure: expected it to return the loss, a scalar tensor or a number, got {what}"
    )


def _zeroing(dim: int, channels: list[int], device: torch.device) -> Callable[[Tensor], Tensor]:
    index = torch.tensor(channels, device=device)
    return lambda tensor: tensor.index_fill(dim, index, 0)
