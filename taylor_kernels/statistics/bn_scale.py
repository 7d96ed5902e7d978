"""The scale of the norm behind each layer, found in a forward pass or by a trace."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.shards import whole
from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.hooks.following_norms import KnowsNorms
from taylor_kernels.statistics.hooks.site_rows import SiteRows
from taylor_kernels.statistics.hooks.sites import OUT, Site
from taylor_kernels.statistics.layers import Layer, filter_count, held_weight
from taylor_kernels.statistics.registry import register_statistic


@register_statistic
class BatchNormScale(KnowsNorms):
    """abs(γ) of the norm behind each layer; nan for a layer that has none.

    Of several at the sites of a gate, the mean; of several that a layer's output is handed to, the
    sum.
    """

    name = "bn_scale"
    columns = "1: abs(γ) of the BatchNorm that follows, nan without one"
    reads = "forward"
    nan_means = (
        "a layer that no BatchNorm with a scale was seen to follow has no such score: ignore it, "
        "or use another criterion"
    )

    at_gates = True

    @torch.no_grad()
    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        if self.sites is not None:
            of_sites = [self._scale_at(site) for site in self.sites.sites]
            keys = [site.key for site in self.sites.sites]
            tables = SiteRows(self.sites, list(self.layers)).tables(keys, of_sites, mean=True)
        else:
            tables = [self._table(name, layer) for name, layer in self.layers.items()]
        if all(table.isnan().all() for table in tables):
            raise RuntimeError(
                "bn_scale: no BatchNorm with a scale was seen to follow a layer in a forward pass; "
                "run one first, or use another criterion if the model has none"
            )
        return tables

    def _scale_at(self, site: Site) -> Tensor:
        module = self.model.get_submodule(site.module)
        if site.side == OUT and isinstance(module, _NormBase) and module.weight is not None:
            return whole(module.weight).abs().float()[:, None]
        device = held_weight(next(iter(self.layers.values()))).device
        return torch.full((site.classes.numel(), 1), torch.nan, device=device)

    def _table(self, name: str, layer: Layer) -> Tensor:
        weights = [n.weight for n in self._norms.of(name) if n.weight is not None]
        scales = [whole(weight).abs().float() for weight in weights]
        if not scales:
            device = held_weight(layer).device
            return torch.full((filter_count(layer), 1), torch.nan, device=device)
        return torch.stack(scales, 1).sum(1, keepdim=True)
