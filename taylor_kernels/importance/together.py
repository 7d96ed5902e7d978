"""The minibatches that a rank has scored, until all ranks exchange what they have of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.distributed.scores import TotalRound
from taylor_kernels.distributed.tables import TableRound, exchanges_tables
from taylor_kernels.importance.totals import Observed, Totals
from taylor_kernels.statistics import Statistic


class Alone:
    """A meter's minibatches without ranks, under the verbs of `Together`.

    Each counts as soon as it is scored, so that there is never anything to exchange.
    """

    dropped = 0

    def __init__(self, statistic: Statistic) -> None:
        self._statistic = statistic
        self.seen = 0

    def __len__(self) -> int:
        return 0

    @property
    def noise(self) -> Collection[str]:
        """Layers that were rounding noise."""
        return self._statistic.noise

    def prepare(self) -> float:
        return 1.0

    def add(self, tables: list[Tensor], weight: float, totals: Totals) -> bool:
        totals.add(totals.observed(tables, self._statistic.unread), 1)
        return False

    def absent(self) -> bool:
        return False

    def drop(self) -> bool:
        return False

    def clear(self) -> None:
        pass

    def exchange(self, totals: Totals, device: torch.device) -> Iterator[tuple[Observed, int]]:
        return iter(())


class Together:
    """A meter's minibatches on one of several ranks.

    What the ranks exchange is tables, where these add up over the parts of a minibatch, and sums
    of scores where each rank scores its own. Whatever takes a minibatch says whether it is time to
    exchange them.

    Attributes:
        seen: minibatches of the run so far, those that do not count among them.
    """

    def __init__(
        self, ranks: Ranks, criterion: Criterion, statistic: Statistic, sizes: Mapping[str, int]
    ) -> None:
        self._ranks, self._statistic = ranks, statistic
        kind = TableRound if exchanges_tables(statistic, ranks) else TotalRound
        in_parts = statistic.spread is not None
        self._round: TableRound | TotalRound = kind(
            ranks, criterion, type(statistic), sizes, in_parts=in_parts
        )
        self.seen = 0

    def __len__(self) -> int:
        """Minibatches that are this rank's alone yet."""
        return len(self._round)

    @property
    def dropped(self) -> int:
        return self._round.dropped

    @property
    def noise(self) -> frozenset[str]:
        """Layers that were rounding noise on any rank."""
        return self._round.noise

    def prepare(self) -> float:
        """Let the statistic draw what it should on this rank; what it is to divide out as well."""
        return self._ranks.prepare(self._statistic, self.seen)

    def add(self, tables: list[Tensor], weight: float, totals: Totals) -> bool:
        """A minibatch of this rank: the table of every layer."""
        if isinstance(self._round, TotalRound):
            seen = totals.observed(tables, self._statistic.unread)
            self._round.add_scores(self._statistic, tables, weight, seen)
        else:
            self._round.add(self._statistic, tables, weight)
        return self._counted()

    def absent(self) -> bool:
        """A minibatch that this rank has no part of."""
        self._round.absent()
        return self._counted()

    def drop(self) -> bool:
        """A minibatch that is to count on no rank."""
        self._round.drop()
        return self._counted()

    def _counted(self) -> bool:
        self.seen += 1
        return len(self._round) >= self._ranks.window

    def clear(self) -> None:
        """Forget what was not exchanged."""
        self._round.clear()

    def exchange(self, totals: Totals, device: torch.device) -> Iterator[tuple[Observed, int]]:
        """What all ranks have seen since they did so last, and how many minibatches it is of.

        A collective, unless nothing came since.
        """
        if isinstance(self._round, TableRound):
            for tables in self._round.exchange(device):
                yield totals.observed(tables, self._round.unread), 1
        elif len(self._round):
            total, squares, counts, updates = self._round.exchange()
            yield Observed(total.to(device), squares.to(device), counts), updates
