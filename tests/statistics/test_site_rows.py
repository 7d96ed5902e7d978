"""Tables of layers are the sums over all sites at which a channel's gate stands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taylor_kernels.statistics.hooks import site_rows
from taylor_kernels.statistics.hooks.site_rows import SiteRows
from taylor_kernels.statistics.hooks.sites import ELSEWHERE, OUT, GateSites, Site


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1, 8, 1 << 24]))
def test_a_filter_has_what_stands_at_all_its_sites(seed: int, mean: bool, gathered: int):
    drawn = torch.Generator().manual_seed(seed)

    def some(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(most, shape, generator=drawn)

    classes = int(some(12, 1)) + 1
    of_sites = [some(classes + 1, 1 + int(some(9, 1))) + ELSEWHERE for _ in range(3)]
    layers = {name: some(classes + 2, 1 + int(some(5, 1))) for name in ("one", "other")}
    where = GateSites(tuple(Site(f"m{n}", OUT, -1, c) for n, c in enumerate(of_sites)), layers)
    width = 1 + int(some(3, 1))
    tables = [torch.randn(len(c), width, generator=drawn, dtype=torch.float64) for c in of_sites]
    for table in tables if mean else ():
        table[torch.rand(table.shape, generator=drawn) < 0.3] = torch.nan
    given = torch.randperm(3, generator=drawn)[: 1 + int(some(3, 1))].tolist()
    rows = [tables[n] for n in given]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_rows, "_GATHERED", gathered)
        found = SiteRows(where, [*layers]).tables([f"m{n}" for n in given], rows, mean=mean)
    every, rows = torch.cat([of_sites[n] for n in given]), torch.cat(rows)
    anywhere = torch.cat(of_sites)
    for own, table in zip(layers.values(), found, strict=True):
        for one, row in zip(own.tolist(), table, strict=True):
            stand = rows[every == one]
            if not (anywhere == one).any():
                assert row.isnan().all()
                continue
            expected = stand.nanmean(0) if mean else stand.sum(0)
            torch.testing.assert_close(row, expected, equal_nan=True)
    keys = where.sites_of_layers()
    for name, own in layers.items():
        at = [bool(torch.isin(each, own).any()) for each in of_sites]
        assert keys[name] == [f"m{n}" for n, stands in enumerate(at) if stands]
        placed = torch.isin(own, anywhere)
        assert (name in where.hidden) == (not placed.all())
        assert (name in where.unplaced) == (not placed.any())
