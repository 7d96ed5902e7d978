"""Scores of coupled units in a minibatch, from the rows of their filters in the layers' tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taylor_kernels.criteria import Criterion
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.statistics.tables import rows_of_all
from taylor_kernels.tracing import Slot

#: Elements gathered at a time. The index is padded to the widest unit of the network, so all rows
#: together may be many times as large as the tables, and those have a column for every example.
_GATHERED = 1 << 24


class _Run(NamedTuple):
    """What is read of the tables for groups that are scored together.

    Attributes:
        places: of the tables, in the order of layers.
        rows: [U, M] int64, those of each unit in the tables one after the other, padded.
    """

    places: list[int]
    rows: Tensor


class UnitRows:
    """Which rows of the layers' tables each unit is scored by.

    The rows of coupled filters become one, as the criterion says, before they are scored: the
    shared gate of Molchanov et al. Sums go through a padded index, not through atomics, so they
    have the same bits on every run.

    Args:
        scored: the layers whose tables `scores` is given, in order.
        whole: a filter's row is that of its whole unit already, as where statistics stand at gate
            sites, so that the first one's serves.

    Attributes:
        groups: those whose units are scored.
        unread: layers whose tables say nothing.
    """

    def __init__(
        self, criterion: Criterion, groups: Sequence[Group], scored: Sequence[str], *, whole: bool
    ) -> None:
        self._criterion, self._whole = criterion, whole
        self.unread: frozenset[str] = frozenset()
        self.regroup(groups, scored)

    def regroup(self, groups: Sequence[Group], scored: Sequence[str] | None = None) -> None:
        """Score these groups from now on; by the tables of these layers, if others than before."""
        self.groups = list(groups)
        self._plans: dict[tuple[int, ...], list[_Run]] = {}  # by the tables' numbers of columns
        if scored is not None:
            self._layers = {name: number for number, name in enumerate(scored)}

    def leave_out(self, unread: frozenset[str]) -> None:
        """Score units without these layers, where they have filters in others."""
        if unread != self.unread:
            self.unread, self._plans = unread, {}

    def scores(self, tables: Sequence[Tensor]) -> Tensor:
        """[U of all groups] float64, from the [F, K] table of every scored layer."""
        rows = rows_of_all(tables)
        if rows is None:
            widths = tuple(table.size(1) for table in tables)
        else:
            widths = (rows.size(1),) * len(tables)
        if widths not in self._plans:
            self._plans[widths] = [self._planned(tables, run) for run in self._runs(tables)]
        found = [self._score(tables, run) for run in self._plans[widths]]
        if len(found) == 1:
            return found[0].double()
        return torch.cat(found).double() if found else torch.empty(0, dtype=torch.float64)

    @property
    def unscored(self) -> list[bool]:
        """Of each group, whether none of its layers could be read in this period."""
        if not self.unread:
            owners = ([slot.owner for slot in group.producers] for group in self.groups)
            return [self._layers.keys().isdisjoint(some) for some in owners]
        return [
            all(slot.owner in self.unread for slot in self._members(group)) for group in self.groups
        ]

    def _members(self, group: Group) -> list[Slot]:
        """The layers that score a group: all that have a table, or those of them that were read;
        none where all have gone with their blocks."""
        scored = [slot for slot in group.producers if slot.owner in self._layers]
        if self._whole and scored:
            return [replace(scored[0], index=scored[0].index[:, :1])]
        return [slot for slot in scored if slot.owner not in self.unread] or scored

    def _runs(self, tables: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Groups whose tables have equally many columns, as runs of consecutive numbers.

        Scores may look at all rows at once (SNIP divides by their sum), so whatever can be scored
        together is. Layers differ where a layer sees another number of examples.
        """
        runs: list[list[int]] = []
        columns: list[int] = []
        for number, group in enumerate(self.groups):
            members = self._members(group)
            width = tables[self._layers[members[0].owner]].size(1) if members else 0
            if runs and columns[-1] == width:
                runs[-1].append(number)
            else:
                runs.append([number])
                columns.append(width)
        return [tuple(run) for run in runs]

    def _planned(self, tables: Sequence[Tensor], run: tuple[int, ...]) -> _Run:
        members = self._members(self.groups[run[0]])
        if not members:
            units = sum(self.groups[number].size for number in run)
            return _Run([], torch.empty(units, 0, dtype=torch.int64))
        width = tables[self._layers[members[0].owner]].size(1)
        places = [place for place, table in enumerate(tables) if table.size(1) == width]
        index = self._gather_index(run, {place: len(tables[place]) for place in places})
        return _Run(places, index.to(tables[places[0]].device))

    def _score(self, tables: Sequence[Tensor], run: _Run) -> Tensor:
        """[U] scores of a run of groups."""
        if not run.places:
            return torch.zeros(len(run.rows), device=tables[0].device)
        rows = rows_of_all(tables)
        if rows is None:
            device = tables[run.places[0]].device
            rows = torch.cat([tables[place].to(device) for place in run.places])
        index = run.rows.to(rows.device)
        return self._criterion.minibatch_scores(self._coupled_rows(rows, index))

    def _coupled_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """[U, K] from the rows of each unit; the padding points behind them."""
        if self._criterion.coupled == "first" or index.size(1) == 1:
            return rows.index_select(0, index[:, 0])
        rows = torch.cat([rows, rows.new_zeros(1, rows.size(1))])
        units = max(_GATHERED // max(index.size(1) * rows.size(1), 1), 1)
        total = torch.cat([rows[part].sum(1) for part in index.split(units)])
        if self._criterion.coupled == "mean":
            return total / (index < len(rows) - 1).sum(1, keepdim=True)
        return total

    def _gather_index(self, run: tuple[int, ...], rows: Mapping[int, int]) -> Tensor:
        """[U, M] int64: the rows of each unit in the concatenated tables.

        Args:
            rows: place of a table -> how many rows it has, in their order.
        """
        starts, pad = {}, 0
        for place, count in rows.items():
            starts[place] = pad
            pad += count
        blocks = []
        for number in run:
            members = self._members(self.groups[number])
            parts = [slot.index + starts[self._layers[slot.owner]] for slot in members]
            blocks.append(torch.cat(parts, 1))
        widest = max(block.size(1) for block in blocks)
        return torch.cat(
            [nn.functional.pad(block, (0, widest - block.size(1)), value=pad) for block in blocks]
        )
