"""From what was read at gates to the tables of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from taylor_kernels.shards import along_mesh
from taylor_kernels.statistics.hooks.noise import Noise
from taylor_kernels.statistics.hooks.site_rows import SiteRows
from taylor_kernels.statistics.hooks.sites import GateSites
from taylor_kernels.statistics.layers import Layers, filter_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Packed(NamedTuple):
    """Tables of one column, one after the other in one tensor.

    Attributes:
        keys: the names of the sites or layers, each once.
        sizes: how many gates there are of each.
        slopes: [sum of the sizes].
    """

    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    slopes: Tensor

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """(name, [C]) of each."""
        return zip(self.keys, self.slopes.split(self.sizes), strict=True)


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

    def finish(
        self, tables: Mapping[str, Tensor], training: bool, packed: Sequence[Packed] = ()
    ) -> list[Tensor]:
        """[F, K] of each layer from those that were filled, by name, at the end of an update.

        Args:
            training: the model's mode.
            packed: further tables, where all have one column; no name is given twice.
        """
        if packed and (self.mesh is not None or self._rows is None):
            each = (one for some in packed for one in some.each())
            tables, packed = {**tables, **{key: own[:, None] for key, own in each}}, ()
        found = self._by_layer(tables, packed)
        self.noise.close_update(
            training, lambda sums: dict(zip(self._layers, self._by_layer(sums), strict=True))
        )
        if not self.noise.layers:
            return found
        return [
            torch.full_like(table, torch.nan) if name in self.noise.layers else table
            for name, table in zip(self._layers, found, strict=True)
        ]

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

    def _by_layer(
        self, tables: Mapping[str, Tensor], packed: Sequence[Packed] = ()
    ) -> list[Tensor]:
        if self.mesh is not None:
            tables = self._of_all_ranks(tables, self.mesh)
        if self._rows is None:
            like = next(iter(tables.values()))
            return [
                tables[name] if name in tables else like.new_zeros(width, like.size(1))
                for name, width in self.widths.items()
            ]
        counts = [table.size(1) for table in tables.values()]
        if len(set(counts)) <= 1:
            keys = [*tables, *(key for some in packed for key in some.keys)]
            rows = [*tables.values(), *(some.slopes[:, None] for some in packed)]
            return self._rows.tables(keys, rows)
        # A layer may be given other examples than another, and its table has other columns then.
        columns = {name: self._columns(name, tables, counts[0]) for name in self._layers}
        found: dict[str, Tensor] = {}
        for count in dict.fromkeys(columns.values()):
            alike = {key: table for key, table in tables.items() if table.size(1) == count}
            made = zip(self._layers, self._rows.tables([*alike], [*alike.values()]), strict=True)
            found |= {name: table for name, table in made if columns[name] == count}
        return [found[name] for name in self._layers]

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
