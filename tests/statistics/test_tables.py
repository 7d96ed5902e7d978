"""Tables that lie in one tensor are a list as any other, and are scored as one would be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.statistics import checked_tables, get_statistic
from taylor_kernels.statistics.tables import PackedTables, rows_of_all


def _drawn() -> PackedTables:
    return PackedTables(torch.randn(6, 2), {"a": 1, "b": 3, "c": 2})


def test_rows_are_those_of_the_tables_and_share_their_memory():
    tables = _drawn()
    assert isinstance(tables, list)
    assert [len(table) for table in tables] == [1, 3, 2]
    rows = rows_of_all(tables)
    assert rows is not None
    tables[1].mul_(2)
    assert torch.equal(rows, torch.cat(tables))
    assert rows_of_all(list(tables)) is None
    alike = copy.deepcopy(tables)
    tables[1].zero_()
    assert torch.equal(alike.rows, torch.cat(alike))


def _replace(tables: list[Tensor]) -> None:
    tables[1] = tables[1] + 1


def _reorder(tables: list[Tensor]) -> None:
    tables.reverse()


def _drop(tables: list[Tensor]) -> None:
    del tables[0]


@pytest.mark.parametrize("change", [_replace, _reorder, _drop])
def test_a_list_that_was_changed_is_read_table_by_table(change: Callable[[list[Tensor]], None]):
    tables = _drawn()
    change(tables)
    assert tables.rows is None


@pytest.mark.parametrize("names", [("3", "0"), ("0",)])
def test_packed_tables_of_other_layers_are_refused(names: tuple[str, ...]):
    """As a statistic of one's own may hand on, that asks one of this package of fewer layers."""
    model, _ = _net()
    statistic = get_statistic("gates")(model, {"0": model[0], "3": model[3]})
    widths = {"0": 8, "3": 6}
    rows = torch.randn(sum(widths[name] for name in names), 1)
    with pytest.raises(ValueError, match="statistic 'gates': collect"):
        checked_tables(statistic, PackedTables(rows, {name: widths[name] for name in names}))


def _net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    return nn.Sequential(*layers, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 2)), torch.randn(
        4, 3, 8, 8
    )


def test_what_a_subclass_makes_of_the_tables_counts(monkeypatch: pytest.MonkeyPatch):
    """A statistic of one's own may put other tables into the list of one of this package."""
    kind = get_statistic("gates")
    collect = kind.collect

    def halved(self: tk.Statistic, **named: object) -> list[Tensor]:
        tables = collect(self, **named)
        assert rows_of_all(tables) is not None
        tables[0] = tables[0] / 2
        return checked_tables(self, tables)

    found = {}
    for way in ("as it is", "halved"):
        model, x = _net()
        pruner = tk.Pruner(model, x[:1], filters=0.5, every=2, verify=False)
        if way == "halved":
            monkeypatch.setattr(kind, "collect", halved)
        model(x).square().mean().backward()
        pruner.step()
        found[way] = pruner.state_dict()["scores"]["sum"]
    expected = found["as it is"].clone()
    expected[:8] /= 4  # scores are squares
    assert torch.equal(found["halved"], expected)
