"""The scores of units over all ranks: kept by each, exchanged at a pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks, digest
from taylor_kernels.distributed.scores import MeanRound
from taylor_kernels.distributed.tables import TableRound, exchanges_tables
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.scores.block_scores import BlockScores
from taylor_kernels.pruning.scores.unit_scores import UnitScores
from taylor_kernels.statistics import Statistic, get_statistic
from taylor_kernels.statistics.base import check_no_noise


class Gathering:
    """Minibatches on their way from the ranks into `UnitScores`, which are then the same on all.

    Args:
        statistic: that is watched; None where no minibatch is to come.
        scores: where they go.
        sizes: layer that is scored -> filters.
        groups: those whose units are scored.
        device: of the model.
        dropped: minibatches that did not count before.
        blocks: the scores of residual blocks, where these may go. To the ranks a block is one
            layer more, of a single filter.
    """

    def __init__(
        self,
        ranks: Ranks,
        criterion: Criterion,
        statistic: Statistic | None,
        scores: UnitScores,
        sizes: Mapping[str, int],
        groups: Sequence[Group],
        device: torch.device,
        dropped: int = 0,
        blocks: BlockScores | None = None,
    ) -> None:
        self._ranks, self._scores, self._device = ranks, scores, device
        self._layers, self._blocks = list(sizes), blocks
        names = {} if blocks is None else {n: f"block {blocks.name_of(n)}" for n in blocks.left}
        kind = get_statistic(criterion.statistic)
        in_parts = statistic is not None and statistic.spread is not None
        self._units = sum(group.size for group in groups)
        self._gates: dict[int, str] = {}
        self._round: TableRound | MeanRound
        if statistic is None or exchanges_tables(statistic, ranks):
            if blocks is not None and blocks.at_gates:
                self._gates = names
            sizes = {**sizes, **dict.fromkeys(self._gates.values(), 1)}
            self._round = TableRound(ranks, criterion, kind, sizes, in_parts=in_parts)
        else:
            count, scores_of = self._units, _units(groups)
            if blocks is not None:
                scores_of |= {name: torch.tensor([count + n]) for n, name in names.items()}
                count += len(blocks)
            self._round = MeanRound(ranks, criterion, kind, sizes, units=scores_of, count=count)
        self._round.dropped = dropped

    def __len__(self) -> int:
        return len(self._round)

    @property
    def dropped(self) -> int:
        """Minibatches that did not count on any rank."""
        return self._round.dropped

    def add(
        self,
        statistic: Statistic,
        tables: list[Tensor],
        weight: float,
        gates: Mapping[int, Tensor],
    ) -> None:
        """A minibatch of this rank.

        Args:
            gates: block -> the table of its gate, of those that have one.
        """
        if isinstance(self._round, MeanRound):
            scores = self._scores.of(tables, statistic.unread)
            if self._blocks is not None:
                scores = torch.cat([scores, self._of_blocks(tables, gates).to(scores)])
            self._round.add_scores(statistic, tables, weight, scores)
        else:
            nothing = tables[0].new_zeros(1, 1)
            of_blocks = [gates.get(number, nothing) for number in self._gates]
            missing = frozenset(name for n, name in self._gates.items() if n not in gates)
            self._round.add(statistic, [*tables, *of_blocks], weight, missing)

    def absent(self) -> None:
        self._round.absent()

    def drop(self) -> None:
        self._round.drop()

    def clear(self) -> None:
        self._round.clear()

    def due(self, every: int) -> bool:
        """Whether the ranks are to meet, as all of them find at the same minibatch."""
        return len(self) >= min(self._ranks.window, every - self._scores.count)

    def exchange(self) -> int:
        """Bring what the ranks have kept into the scores; how many minibatches count. Collective.

        Raises:
            RuntimeError: a rank did not come in time, or gates are rounding noise, on all ranks.
        """
        if not len(self):
            return 0
        if isinstance(self._round, MeanRound):
            total, number = self._round.exchange()
            self._scores.note(self._round.unread)
            if number:
                total = total.to(self._device)
                self._scores.take(total[: self._units], number)
                if self._blocks is not None:
                    self._blocks.take(total[self._units :], number)
        else:
            minibatches = self._round.exchange(self._device)
            number = len(minibatches)
            for tables in minibatches:
                of_layers, of_blocks = tables[: len(self._layers)], tables[len(self._layers) :]
                self._scores.add(of_layers, self._round.unread.intersection(self._layers))
                if self._blocks is not None:
                    named = zip(self._gates.items(), of_blocks, strict=True)
                    read = {n: t for (n, name), t in named if name not in self._round.unread}
                    self._blocks.take(self._of_blocks(of_layers, read), 1)
        check_no_noise(sorted(self._round.noise))
        return number

    def _of_blocks(self, tables: Sequence[Tensor], gates: Mapping[int, Tensor]) -> Tensor:
        assert self._blocks is not None
        return self._blocks.of(dict(zip(self._layers, tables, strict=True)), gates)

    def check_masks(
        self, groups: Sequence[Group], removed: Sequence[Tensor], blocks: Mapping[str, bool]
    ) -> None:
        """Every rank has removed the same filters and blocks; a collective.

        Raises:
            RuntimeError: the first layer whose filters differ, or block that is gone on some.
        """
        masks: dict[str, bytes] = {}
        for group, gone in zip(groups, removed, strict=True):
            for slot in group.producers:
                masks[slot.owner] = masks.get(slot.owner, b"") + gone.numpy().tobytes()
        digests = {name: digest(mask) for name, mask in masks.items()}
        digests |= {f"block {name}": int(gone) for name, gone in blocks.items()}
        self._ranks.check_alike(digests, "the filters that were removed")


def _units(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Layer -> the numbers of the units that it has filters in."""
    found: dict[str, list[Tensor]] = {}
    begin = 0
    for group in groups:
        numbers = begin + torch.arange(group.size)
        begin += group.size
        for slot in group.producers:
            found.setdefault(slot.owner, []).append(numbers)
    return {name: torch.cat(parts) for name, parts in found.items()}
