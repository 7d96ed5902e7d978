"""Scores of coupled units: gathered from the layers' tables, averaged over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taylor_kernels.criteria import Criterion
from taylor_kernels.pruning.budget import SILENT, UNREAD
from taylor_kernels.pruning.groups import Group
from taylor_kernels.statistics import Layers, filter_count, get_statistic
from taylor_kernels.tracing import Slot

#: Elements gathered at a time. The index is padded to the widest unit of the network, so all rows
#: together may be many times as large as the tables, and those have a column for every example.
_GATHERED = 1 << 24


def not_finite(where: str, what: str, remedy: str = "") -> RuntimeError:
    """The error of scores that nothing can be ranked by.

    Args:
        where: the layers or blocks.
        what: how many of what they are.
        remedy: in place of the usual one.
    """
    usual = (
        "look for inf or nan in the loss, and call skip() in place of step() for minibatches that "
        "a GradScaler skips"
    )
    return RuntimeError(
        f"{where}: {what} have scores that are not finite, so nothing was pruned and the "
        f"minibatches since the last pruning were dropped; {remedy or usual}"
    )


class _Run(NamedTuple):
    """What is read of the tables for groups that are scored together.

    Attributes:
        places: of the tables, in the order of layers.
        rows: [U, M] int64, those of each unit in the tables one after the other, padded.
    """

    places: list[int]
    rows: Tensor


class UnitScores:
    """Running scores of all units, group after group.

    The rows of coupled filters become one, as the criterion says, before they are scored: the
    shared gate of Molchanov et al. Sums go through a padded index, not through atomics, so they
    have the same bits on every run.

    Args:
        scored: the layers whose tables `add` is given, in order.
        whole: a filter's row is that of its whole unit already, as where statistics stand at gate
            sites, so that the first one's serves.
    """

    def __init__(
        self,
        criterion: Criterion,
        groups: Sequence[Group],
        scored: Sequence[str],
        *,
        whole: bool = False,
    ) -> None:
        self._criterion = criterion
        self._whole = whole
        self._layers = {name: number for number, name in enumerate(scored)}
        self._groups = list(groups)
        self._plans: dict[tuple[int, ...], list[_Run]] = {}  # by the tables' numbers of columns
        self._sum: Tensor | None = None  # [U of all groups] float64
        self._average: Tensor | None = None
        self._unread: frozenset[str] = frozenset()
        self._silent: list[str] = []  # layers that stay for it, as of the last pruning
        self.count = 0

    def add(self, tables: Sequence[Tensor], unread: frozenset[str] = frozenset()) -> None:
        """Add a minibatch: the [F, K] table of every scored layer.

        Args:
            unread: layers whose tables say nothing. Units are scored by the other layers that
                they have filters in; those that have no other are not scored.
        """
        self.take(self.of(tables, unread), 1)

    def of(self, tables: Sequence[Tensor], unread: frozenset[str] = frozenset()) -> Tensor:
        """[U of all groups] float64: the scores of a minibatch; arguments as those of `add`."""
        self.note(unread)
        widths = tuple(table.size(1) for table in tables)
        if widths not in self._plans:
            self._plans[widths] = [self._planned(tables, run) for run in self._runs(tables)]
        found = [self._score(tables, run) for run in self._plans[widths]]
        return torch.cat(found).double() if found else torch.empty(0, dtype=torch.float64)

    def note(self, unread: frozenset[str]) -> None:
        """That these layers have no table in this period."""
        if self.count:
            unread |= self._unread  # a unit's scores of one period are of the same layers
        if unread != self._unread:
            self._unread, self._plans = unread, {}

    def take(self, scores: Tensor, count: int) -> None:
        """Add the sum of the scores of `count` minibatches."""
        self._sum = scores if self._sum is None else self._sum.to(scores) + scores
        self.count += count

    def close_period(
        self, momentum: float, dead: Sequence[Tensor], silent: Sequence[bool] = ()
    ) -> list[Tensor]:
        """What to rank by, [U] on the CPU per group: the average since the last call, taken into
        the moving average; relative to its group's mean where the criterion says so. Groups that
        are `unscored`, or are to stay since they are `silent`, come last, at infinity.

        Raises:
            RuntimeError: a unit that is not dead has no finite score; the period is dropped.
        """
        assert self._sum is not None
        mean = self._sum / self.count
        self._sum, self.count = None, 0
        unscored = [a or b for a, b in zip_longest(self.unscored, silent, fillvalue=False)]
        if any(unscored):
            sizes = torch.tensor([group.size for group in self._groups])
            without = torch.tensor(unscored).repeat_interleave(sizes).to(mean.device)
            mean = mean.where(~without, torch.nan)
        average = mean
        if self._average is not None:
            past = self._average.to(mean)
            mixed = momentum * past + (1 - momentum) * mean
            average = torch.where(past.isnan(), mean, mixed)  # it had no score before
        on_cpu = average.cpu()
        scores = list(on_cpu.split([group.size for group in self._groups]))
        wrong = ~on_cpu.isfinite() & ~torch.cat([torch.empty(0, dtype=torch.bool), *dead])
        if wrong.any():
            self._check_finite(scores, dead, unscored)
        self._average = average
        self._silent = self.layers_of(silent)
        if not self._criterion.across_layers:
            scores = [
                score / score[~gone].mean() if (score[~gone] > 0).any() else score
                for score, gone in zip(scores, dead, strict=True)
            ]
        return [
            torch.full_like(score, torch.inf) if absent else score
            for score, absent in zip(scores, unscored, strict=True)
        ]

    def silent(self, dead: Sequence[Tensor]) -> list[bool]:
        """Of each group that was read, whether all that is left of it scored 0 from the start.

        Where no loss has depended on a layer yet (the head of a task whose turn comes later, a
        branch that chance has passed over), zeros do not say that it matters less than others.
        """
        reads = get_statistic(self._criterion.statistic).reads
        if self._sum is None or reads in ("weights", "forward"):  # zeros say all there is to say
            return [False] * len(self._groups)
        heard = self._sum != 0
        if self._average is not None:
            heard |= ~self._average.to(heard.device).isnan()
        parts = heard.cpu().split([group.size for group in self._groups])
        return [
            not (absent or bool(part[~gone].any()) or bool(gone.all()))
            for part, gone, absent in zip(parts, dead, self.unscored, strict=True)
        ]

    def layers_of(self, chosen: Sequence[bool]) -> list[str]:
        """The layers of some groups."""
        groups = [group for group, yes in zip(self._groups, chosen, strict=False) if yes]
        return [slot.owner for group in groups for slot in group.producers]

    def _check_finite(
        self, scores: Sequence[Tensor], dead: Sequence[Tensor], unscored: Sequence[bool]
    ) -> None:
        """Units that are not dead, of groups that were read, have finite scores, or an error."""
        for group, score, gone, absent in zip(self._groups, scores, dead, unscored, strict=True):
            bad = ~score.isfinite() & ~gone
            if bad.any() and not absent:
                layers = ", ".join(slot.owner for slot in group.producers)
                nan_means = get_statistic(self._criterion.statistic).nan_means
                means = nan_means if score[bad].isnan().any() else ""
                raise not_finite(layers, f"{int(bad.sum())} of {group.size} units", means)

    def forget(self) -> None:
        """Forget the minibatches since the last pruning."""
        self._sum, self.count = None, 0

    @property
    def unscored_layers(self) -> dict[str, str]:
        """The layers of groups that have no score -> why."""
        unread = self.layers_of(self.unscored)
        return dict.fromkeys(self._silent, SILENT) | dict.fromkeys(unread, UNREAD)

    @property
    def unscored(self) -> list[bool]:
        """Of each group, whether none of its layers could be read in this period."""
        if not self._unread:
            owners = ([slot.owner for slot in group.producers] for group in self._groups)
            return [self._layers.keys().isdisjoint(some) for some in owners]
        return [
            all(slot.owner in self._unread for slot in self._members(group))
            for group in self._groups
        ]

    def _members(self, group: Group) -> list[Slot]:
        """The layers that score a group: all that have a table, or those of them that were read;
        none where all have gone with their blocks."""
        scored = [slot for slot in group.producers if slot.owner in self._layers]
        if self._whole and scored:
            return [replace(scored[0], index=scored[0].index[:, :1])]
        return [slot for slot in scored if slot.owner not in self._unread] or scored

    def regroup(self, groups: Sequence[Group], scored: Sequence[str]) -> None:
        """Blocks have gone: the same units, without their layers."""
        self._groups, self._plans = list(groups), {}
        self._layers = {name: number for number, name in enumerate(scored)}

    def drop(self, dead: Sequence[Tensor], groups: Sequence[Group]) -> None:
        """Forget dead units; `groups` are the ones that remain."""
        keep = ~torch.cat([torch.empty(0, dtype=torch.bool), *dead])
        if keep.all():
            return
        for name in ("_sum", "_average"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[keep.to(values.device)])
        self._groups, self._plans = list(groups), {}

    def by_layer(
        self, dead: Sequence[Tensor], layers: Callable[[Iterable[str]], Layers]
    ) -> dict[str, Tensor]:
        """Layer -> [F] averages; nan for filters that are dead or in no group."""
        if self._average is None:
            return {}
        known = layers({slot.owner for group in self._groups for slot in group.producers})
        found: dict[str, Tensor] = {}
        scores = self._average.cpu().split([group.size for group in self._groups])
        for group, gone, score in zip(self._groups, dead, scores, strict=True):
            for slot in group.producers:
                if slot.owner not in found:
                    width = filter_count(known[slot.owner])
                    found[slot.owner] = torch.full((width,), float("nan"))
                shown = torch.where(gone, float("nan"), score).float()
                found[slot.owner][slot.index] = shown[:, None].expand_as(slot.index)
        return found

    def state_dict(self) -> dict[str, Any]:
        def held(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.cpu().clone()

        return {"sum": held(self._sum), "average": held(self._average), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._average = state["sum"], state["average"]
        self.count = state["count"]

    def _runs(self, tables: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Groups whose tables have equally many columns, as runs of consecutive numbers.

        Scores may look at all rows at once (SNIP divides by their sum), so whatever can be scored
        together is. Layers differ where a layer sees another number of examples.
        """
        runs: list[list[int]] = []
        columns: list[int] = []
        for number, group in enumerate(self._groups):
            members = self._members(group)
            width = tables[self._layers[members[0].owner]].size(1) if members else 0
            if runs and columns[-1] == width:
                runs[-1].append(number)
            else:
                runs.append([number])
                columns.append(width)
        return [tuple(run) for run in runs]

    def _planned(self, tables: Sequence[Tensor], run: tuple[int, ...]) -> _Run:
        names = {slot.owner for number in run for slot in self._members(self._groups[number])}
        if not names:
            units = sum(self._groups[number].size for number in run)
            return _Run([], torch.empty(units, 0, dtype=torch.int64))
        used = sorted(names, key=self._layers.__getitem__)
        places = [self._layers[name] for name in used]
        index = self._gather_index(run, used, [tables[place].size(0) for place in places])
        return _Run(places, index.to(tables[places[0]].device))

    def _score(self, tables: Sequence[Tensor], run: _Run) -> Tensor:
        """[U] scores of a run of groups."""
        if not run.places:
            return torch.zeros(len(run.rows), device=tables[0].device)
        chosen = [tables[place] for place in run.places]
        device = chosen[0].device
        # The last row is what the padding points at.
        padding = chosen[0].new_zeros(1, chosen[0].size(1))
        rows = torch.cat([*(table.to(device) for table in chosen), padding])
        index = run.rows.to(device)
        return self._criterion.minibatch_scores(self._coupled_rows(rows, index))

    def _coupled_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """[U, K] from the rows of each unit; the padding's are zero and come last."""
        if self._criterion.coupled == "first":
            return rows[index[:, 0]]
        units = max(_GATHERED // max(index.size(1) * rows.size(1), 1), 1)
        total = torch.cat([rows[part].sum(1) for part in index.split(units)])
        if self._criterion.coupled == "mean":
            return total / (index < len(rows) - 1).sum(1, keepdim=True)
        return total

    def _gather_index(self, run: tuple[int, ...], used: list[str], rows: list[int]) -> Tensor:
        """[U, M] int64: the rows of each unit in the concatenated tables."""
        starts = {name: sum(rows[:number]) for number, name in enumerate(used)}
        blocks = []
        for number in run:
            members = self._members(self._groups[number])
            blocks.append(torch.cat([slot.index + starts[slot.owner] for slot in members], 1))
        widest = max(block.size(1) for block in blocks)
        pad = sum(rows)
        return torch.cat(
            [nn.functional.pad(block, (0, widest - block.size(1)), value=pad) for block in blocks]
        )
