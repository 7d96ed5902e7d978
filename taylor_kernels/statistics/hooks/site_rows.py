"""From tables of gate sites, a row for each channel, to tables of layers, a row for each filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.statistics.hooks.sites import GateSites
from taylor_kernels.statistics.tables import PackedTables

#: Elements gathered at a time: tables have a column for every example, and a row for every channel.
_GATHERED = 1 << 24


class SiteRows:
    """Makes tables of layers, [F, K], of the tables of sites, [C, K]: a filter's row is that of its
    gate, the sum over all channels of its class at all sites, each counted once."""

    def __init__(self, where: GateSites, layers: Sequence[str]) -> None:
        wanted, place = torch.cat([where.layers[name] for name in layers]).unique(
            return_inverse=True
        )
        classes = torch.cat([wanted[:0], *(site.classes for site in where.sites)])
        rows = torch.isin(classes, wanted).nonzero().flatten()
        number = torch.searchsorted(wanted, classes[rows])
        order = number.argsort(stable=True)
        rows, number = rows[order], number[order]
        counts = torch.bincount(number, minlength=len(wanted))
        first = counts.cumsum(0) - counts
        # Channels of a residual stream have gates at dozens of sites, most others at one.
        alike = [(counts == many).nonzero().flatten() for many in counts.unique().tolist()]
        self._indices = [
            rows[first[one].unsqueeze(1) + torch.arange(int(counts[one[0]]))] for one in alike
        ]
        after = torch.empty_like(counts)
        after[torch.cat(alike)] = torch.arange(len(wanted))
        self._nowhere = counts[torch.cat(alike)] == 0 if (counts == 0).any() else None
        self._place = after[place]
        self._sizes = {name: where.layers[name].numel() for name in layers}
        self._widths = {site.key: site.classes.numel() for site in where.sites}
        self._known: tuple[tuple[str, ...] | None, torch.device | None, list[Tensor]] = (
            None, None, [],
        )  # fmt: skip

    def tables(
        self, keys: Sequence[str], of_sites: Sequence[Tensor], *, mean: bool = False
    ) -> list[Tensor]:
        """The layers' tables.

        Args:
            keys: the sites whose tables are given; those of others are zero.
            of_sites: their rows, in this order, in as many tensors as may be.
            mean: in place of the sum; what is nan at a site does not count.
        """
        device = of_sites[0].device
        indices = self._indices_of(tuple(keys), device)
        parts = [table.to(device) for table in of_sites]
        if mean or len(keys) < len(self._widths):
            parts.append(parts[0].new_zeros(1, parts[0].size(1)))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        total = _gathered(rows.nan_to_num() if mean else rows, indices)
        if mean:
            number = (~rows.isnan()).to(rows)
            number[-1] = 0
            total = total / _gathered(number, indices)
        if self._nowhere is not None:
            total[self._nowhere.to(device)] = torch.nan
        return PackedTables(total.index_select(0, self._place.to(device)), self._sizes)

    def _indices_of(self, keys: tuple[str, ...], device: torch.device) -> list[Tensor]:
        """Of gates that stand at as many sites, [gates, sites] int64: their rows in tables in the
        order of these keys; the row behind them is that of other sites, if there are."""
        if self._known[:2] != (keys, device):
            starts = {}
            end = 0
            for key in keys:
                starts[key] = end
                end += self._widths[key]
            nothing = torch.tensor([end])
            places = [
                torch.arange(starts[key], starts[key] + width) if key in starts
                else nothing.expand(width)
                for key, width in self._widths.items()
            ]  # fmt: skip
            row = torch.cat([*places, nothing])
            self._known = keys, device, [row[index].to(device) for index in self._indices]
        return self._known[2]


def _gathered(rows: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """The sums over the rows of each gate."""
    sums = []
    for index in indices:
        if index.size(1) == 1:
            sums.append(rows.index_select(0, index[:, 0]))
            continue
        at_once = max(_GATHERED // max(index.size(1) * rows.size(1), 1), 1)
        sums += [rows[part].sum(1) for part in index.split(at_once)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)
