"""Scores of coupled units, averaged over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.pruning.choosing.budget import SILENT, UNREAD
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.scores.unit_rows import UnitRows
from taylor_kernels.statistics import Layers, filter_count, get_statistic


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


class UnitScores:
    """Running scores of all units, group after group.

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
        self._rows = UnitRows(criterion, groups, scored, whole=whole)
        self._sum: Tensor | None = None  # [U of all groups] float64
        self._average: Tensor | None = None
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
        return self._rows.scores(tables)

    def note(self, unread: frozenset[str]) -> None:
        """That these layers have no table in this period."""
        if self.count:
            unread |= self._rows.unread  # a unit's scores of one period are of the same layers
        self._rows.leave_out(unread)

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
            sizes = torch.tensor([group.size for group in self._rows.groups])
            without = torch.tensor(unscored).repeat_interleave(sizes).to(mean.device)
            mean = mean.where(~without, torch.nan)
        average = mean
        if self._average is not None:
            past = self._average.to(mean)
            mixed = momentum * past + (1 - momentum) * mean
            average = torch.where(past.isnan(), mean, mixed)  # it had no score before
        on_cpu = average.cpu()
        scores = list(on_cpu.split([group.size for group in self._rows.groups]))
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
            return [False] * len(self._rows.groups)
        heard = self._sum != 0
        if self._average is not None:
            heard |= ~self._average.to(heard.device).isnan()
        parts = heard.cpu().split([group.size for group in self._rows.groups])
        return [
            not (absent or bool(part[~gone].any()) or bool(gone.all()))
            for part, gone, absent in zip(parts, dead, self.unscored, strict=True)
        ]

    def layers_of(self, chosen: Sequence[bool]) -> list[str]:
        """The layers of some groups."""
        groups = [group for group, yes in zip(self._rows.groups, chosen, strict=False) if yes]
        return [slot.owner for group in groups for slot in group.producers]

    def _check_finite(
        self, scores: Sequence[Tensor], dead: Sequence[Tensor], unscored: Sequence[bool]
    ) -> None:
        """Units that are not dead, of groups that were read, have finite scores, or an error."""
        groups = self._rows.groups
        for group, score, gone, absent in zip(groups, scores, dead, unscored, strict=True):
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
        return self._rows.unscored

    def regroup(self, groups: Sequence[Group], scored: Sequence[str]) -> None:
        """Blocks have gone: the same units, without their layers."""
        self._rows.regroup(groups, scored)

    def drop(self, dead: Sequence[Tensor], groups: Sequence[Group]) -> None:
        """Forget dead units; `groups` are the ones that remain."""
        keep = ~torch.cat([torch.empty(0, dtype=torch.bool), *dead])
        if keep.all():
            return
        for name in ("_sum", "_average"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[keep.to(values.device)])
        self._rows.regroup(groups)

    def by_layer(
        self, dead: Sequence[Tensor], layers: Callable[[Iterable[str]], Layers]
    ) -> dict[str, Tensor]:
        """Layer -> [F] averages; nan for filters that are dead or in no group."""
        if self._average is None:
            return {}
        known = layers({slot.owner for group in self._rows.groups for slot in group.producers})
        found: dict[str, Tensor] = {}
        scores = self._average.cpu().split([group.size for group in self._rows.groups])
        for group, gone, score in zip(self._rows.groups, dead, scores, strict=True):
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
