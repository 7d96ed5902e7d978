"""From what was read at gates to the tables of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taylor_kernels.shards import along_mesh
from taylor_kernels.statistics.hooks.noise import Noise
from taylor_kernels.statistics.hooks.sites import GateSites, SiteRows
from taylor_kernels.statistics.layers import Layers, filter_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class GateTables:
    """Puts tables of gates together.

    Attributes:
        widths: how many gates there are by name: of the site, or of the layer where no sites are
            known.
        noise: the layers whose gates have no gradient but rounding noise.
        mesh: the ranks of a tensor parallel plan, each of which may have gates of its own part of a
            layer's outputs; None where there is no plan.
    """

    def __init__(self, layers: Layers, sites: GateSites | None) -> None:
        self.noise = Noise()
        self.mesh: DeviceMesh | None = None
        self._alike = False
        self._layers = list(layers)
        self._rows: SiteRows | None = None
        if sites is None:
            self.widths = {name: filter_count(layer) for name, layer in layers.items()}
        else:
            self.widths = {site.key: site.classes.numel() for site in sites.sites}
            self._rows = SiteRows(sites, self._layers)
            self._sites_of = sites.sites_of_layers()

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

    def _of_all_ranks(self, tables: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
        """Tables with the gates of all ranks of a plan; a collective.

        Raises:
            RuntimeError: outputs are in parts, but not by their channels.
        """
        found = {}
        for name, width in self.widths.items():
            if name not in tables:
                continue
            table = tables[name]
            if len(table) == width:
                found[name] = table
                if not self._alike:
                    own = table.double().sum(1)[None]
                    sums = along_mesh(own, mesh, (mesh.size(), width))
                    size = sums.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
                    if (sums - sums[0]).abs().amax() > 1e-3 * size:
                        raise RuntimeError(
                            f"{name}: the ranks of the tensor parallel plan have different outputs "
                            "of all of its channels, as where a sequence is in parts; use "
                            "taylor_fo, or a plan that leaves sequences whole"
                        )
                continue
            part = -(-width // mesh.size())
            mine = min(part, width - mesh.get_local_rank() * part)
            if not 0 < len(table) == mine:
                raise RuntimeError(
                    f"{name}: this rank has {len(table)} of its {width} channels, which is no even "
                    f"part of them on {mesh.size()} ranks; use taylor_fo"
                )
            found[name] = along_mesh(table, mesh, (width, table.size(1)))
        self._alike = True
        return found

    def _by_layer(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.mesh is not None:
            tables = self._of_all_ranks(tables, self.mesh)
        like = next(iter(tables.values()))
        if self._rows is None:
            return {
                name: tables[name] if name in tables else like.new_zeros(width, like.size(1))
                for name, width in self.widths.items()
            }
        # A layer may be given other examples than another, and its table has other columns then.
        if len({table.size(1) for table in tables.values()}) == 1:
            columns = dict.fromkeys(self._layers, like.size(1))
        else:
            columns = {name: self._columns(name, tables, like.size(1)) for name in self._layers}
        found: dict[str, Tensor] = {}
        for count in dict.fromkeys(columns.values()):
            of_sites = [
                tables[key]
                if key in tables and tables[key].size(1) == count
                else like.new_zeros(width, count)
                for key, width in self.widths.items()
            ]
            made = zip(self._layers, self._rows.tables(of_sites), strict=True)
            found |= {name: table for name, table in made if columns[name] == count}
        return {name: found[name] for name in self._layers}

    def _columns(self, layer: str, tables: Mapping[str, Tensor], default: int) -> int:
        """How many columns the tables have at the sites of a layer's gates."""
        counts = {key: tables[key].size(1) for key in self._sites_of[layer] if key in tables}
        if len(set(counts.values())) > 1:
            most = max(counts, key=counts.__getitem__)
            other = next(key for key in counts if counts[key] != counts[most])
            raise RuntimeError(
                f"{other}: was given {counts[other]} examples (dim 0) and {most} was given "
                f"{counts[most]}, so that one channel's gates at both do not add up; use "
                "taylor_fo_bn"
            )
        return next(iter(counts.values()), default)
