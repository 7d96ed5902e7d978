"""From what was read at gates to the tables of layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taylor_kernels.statistics.hooks.noise import Noise
from taylor_kernels.statistics.hooks.sites import GateSites, SiteRows
from taylor_kernels.statistics.layers import Layers, filter_count


class GateTables:
    """Puts tables of gates together.

    Attributes:
        widths: how many gates there are by name: of the site, or of the layer where no sites are
            known.
        noise: the layers whose gates have no gradient but rounding noise.
    """

    def __init__(self, layers: Layers, sites: GateSites | None) -> None:
        self.noise = Noise()
        self._layers = list(layers)
        self._rows: SiteRows | None = None
        if sites is None:
            self.widths = {name: filter_count(layer) for name, layer in layers.items()}
        else:
            self.widths = {site.key: site.classes.numel() for site in sites.sites}
            self._rows = SiteRows(sites, self._layers)

    def finish(self, tables: Mapping[str, Tensor], training: bool) -> list[Tensor]:
        """[F, K] of each layer from those that were filled, by name, at the end of an update.

        Args:
            training: the model's mode.
        """
        known = self._by_layer(tables)
        self.noise.close_update(training, self._by_layer)
        for name in self.noise.layers:
            known[name] = torch.full_like(known[name], torch.nan)
        return list(known.values())

    def _by_layer(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(tables.values()))
        known = {
            name: tables[name] if name in tables else like.new_zeros(width, like.size(1))
            for name, width in self.widths.items()
        }
        if self._rows is None:
            return known
        return dict(zip(self._layers, self._rows.tables(list(known.values())), strict=True))
