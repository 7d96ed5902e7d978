"""A round: the minibatches that the ranks have seen since they met last, and what they exchange.

A rank's payload, of the same length on all of them:

    int64 [2]        what it is of, and how many minibatches
    float64 [T, 3]   of each minibatch: its state, its weight, its examples
    float32 [...]    columns of each filter: tables of minibatches, or sums of scores over them
    uint8 [L]        of each layer: not read; rounding noise
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks, digest
from taylor_kernels.statistics import Statistic

#: What a rank did with a minibatch.
ABSENT, SEEN, DROPPED = 0, 1, 2
_UNREAD, _NOISE = 1, 2


class Ticks(NamedTuple):
    """What every rank did with each minibatch of a round: [R, T] float64 each."""

    state: Tensor
    weight: Tensor
    examples: Tensor

    @property
    def dropped(self) -> Tensor:
        """[T]: a rank's gradients were not finite, or it skipped the minibatch."""
        return (self.state == DROPPED).any(0)

    @property
    def counts(self) -> Tensor:
        """[T]: the minibatches that count, on any rank."""
        return (self.state == SEEN).any(0) & ~self.dropped

    @property
    def present(self) -> Tensor:
        """[R, T] float64: 1 where a rank takes part in a minibatch that counts."""
        return (self.state == SEEN).double() * self.counts

    def shares(self, values: Tensor) -> Tensor:
        """[R, T]: these of the ranks that take part, over their sum in each minibatch."""
        mine = values * self.present
        return mine / mine.sum(0).where(self.counts, 1.0)


@dataclass
class Tick:
    """A minibatch as this rank has seen it."""

    state: int
    weight: float = 0.0
    examples: int = 0
    rows: Tensor | None = None
    finite: Tensor | None = None

    def header(self) -> list[float]:
        if self.finite is not None and not self.finite:  # asked only now: the host waits for it
            self.state = DROPPED
        return [self.state, self.weight, self.examples]


class Round(ABC):
    """Keeps what this rank has of every minibatch, until the ranks exchange it.

    Args:
        kind: the statistic that the scores are made of.
        sizes: layer -> filters, in the order in which tables are given.
        in_parts: weights lie on several ranks, so that tables are of parts of them.

    Attributes:
        dropped: minibatches that did not count since a rank dropped them, in all rounds.
        noise: layers that were rounding noise on any rank, in all rounds.
        unread: layers that no gradient reached on any rank, in the last round.
    """

    def __init__(
        self,
        ranks: Ranks,
        criterion: Criterion,
        kind: type[Statistic],
        sizes: Mapping[str, int],
        *,
        in_parts: bool = False,
    ) -> None:
        self._in_parts = in_parts
        self._ranks, self._criterion, self._kind = ranks, criterion, kind
        self._sizes = dict(sizes)
        self._order = sorted(self._sizes)
        self._ticks: list[Tick] = []
        self._unread: frozenset[str] = frozenset()
        self.dropped = 0
        self.noise: frozenset[str] = frozenset()
        self.unread: frozenset[str] = frozenset()
        terms = (ranks.gradients, ranks.loss, ranks.minibatch, criterion.name, type(self).__name__)
        said = (*terms, *(f"{name} {self._sizes[name]}" for name in self._order))
        self._identity = digest("\n".join(said).encode())

    def __len__(self) -> int:
        return len(self._ticks)

    def add(
        self,
        statistic: Statistic,
        tables: Sequence[Tensor],
        weight: float,
        unread: frozenset[str] = frozenset(),
    ) -> None:
        """A minibatch of this rank: the table of every layer.

        Args:
            unread: of those that the statistic knows nothing of, the ones without a value.
        """
        self._unread = statistic.unread | unread
        self.noise |= frozenset(statistic.noise)
        if not statistic.counts_here:
            self._ticks.append(Tick(ABSENT))
            return
        known = [
            table for name, table in zip(self._sizes, tables, strict=True) if name not in self.noise
        ]
        # What nan may mean in these tables is not a gradient that overflowed.
        device = tables[0].device
        finite = None
        if known and not self._kind.nan_means:
            finite = torch.stack([statistic.is_finite(t).to(device) for t in known]).all()
        per_example = self._kind.per_example
        examples = max(t.size(1) for t in tables) if per_example else statistic.examples
        if self._kind.across_ranks == "mean" and self._ranks.loss == "sum":
            # It takes the loss for a mean, and has made that of every example's own of it.
            tables = [table / examples**2 for table in tables]
        if spread := statistic.spread:
            # What several ranks hold alike counts once.
            shares = [parts / self._ranks.size for parts in spread]
            tables = [table * share for table, share in zip(tables, shares, strict=True)]
        self._ticks.append(Tick(SEEN, weight, examples, self._rows(tables), finite))

    def absent(self) -> None:
        """A minibatch of the run that this rank has no part of."""
        self._ticks.append(Tick(ABSENT))

    def drop(self) -> None:
        """A minibatch that is not to count on any rank."""
        self._ticks.append(Tick(DROPPED))

    def clear(self) -> None:
        """Forget what was not exchanged."""
        self._ticks.clear()

    @abstractmethod
    def _rows(self, tables: Sequence[Tensor]) -> Tensor:
        """What is kept of a minibatch."""

    @abstractmethod
    def _columns(self, everyone: Ticks) -> Tensor:
        """Float32 to be sent, of the same length on every rank.

        Args:
            everyone: what the ranks did, as far as this one knows.
        """

    def _exchange(self, *, guess: bool) -> tuple[Ticks, Tensor]:
        """What every rank did, and the columns of all, [R, n]; a collective, at times two.

        Args:
            guess: the columns depend on what the others did. A rank takes them to have done as it
                did itself; if they have not, the columns are made, and exchanged, once more.
        """
        own = torch.tensor([tick.header() for tick in self._ticks], dtype=torch.float64)
        own = own.view(-1, 3)
        everyone = Ticks(*own.expand(self._ranks.size, -1, -1).unbind(-1))
        for _ in range(1 + guess):
            heads, columns = self._meet(own, self._columns(everyone))
            everyone = Ticks(*heads.unbind(-1))
            if (heads == heads[0]).all():  # as every rank took them to be
                break
        lost = int(everyone.dropped.sum())
        self.dropped += lost
        if lost and lost == len(self._ticks) > 1:
            who = (everyone.state == DROPPED).any(1).nonzero().flatten().tolist()
            warnings.warn(
                f"none of the last {lost} minibatches counts: gradients of rank "
                f"{', '.join(map(str, who))} were not finite; look for inf or nan in its loss",
                stacklevel=6,
            )
        self._ticks.clear()
        return everyone, columns

    def _meet(self, own: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        head = torch.tensor([self._identity, len(own)])
        marks = torch.tensor(
            [_UNREAD * (n in self._unread) + _NOISE * (n in self.noise) for n in self._order],
            dtype=torch.uint8,
        )
        parts = (head, own.flatten(), columns.detach().cpu().flatten(), marks)
        received = self._ranks.gather(torch.cat([part.view(torch.uint8) for part in parts]))
        lengths = [part.numel() * part.element_size() for part in parts]
        # Memory of their own, at an address of their types.
        heads, ticks, values, seen = (
            p.clone(memory_format=torch.contiguous_format) for p in received.split(lengths, 1)
        )
        others = heads.view(torch.int64)
        for rank in (others != others[0]).any(1).nonzero().flatten().tolist():
            what = ("criterion, layers or Ranks", "number of minibatches")
            differing = [w for w, d in zip(what, others[rank] != others[0], strict=True) if d]
            raise RuntimeError(
                f"rank {rank} has another {' and '.join(differing)} than rank 0; all make the same "
                "meter or pruner, and call update() or step() equally often, or absent() where "
                "they have no minibatch left"
            )
        self.unread, self.noise = (
            frozenset(n for n, m in zip(self._order, seen.T.tolist(), strict=True) if bit & _or(m))
            for bit in (_UNREAD, _NOISE)
        )
        return ticks.view(torch.float64).view(self._ranks.size, -1, 3), values.view(torch.float32)


def _or(marks: Sequence[int]) -> int:
    found = 0
    for mark in marks:
        found |= mark
    return found


def shares_gradients(kind: type[Statistic], ranks: Ranks) -> bool:
    """Whether every rank's table is that of the whole minibatch already."""
    if kind.reads == "weight gradients":
        return ranks.gradients != "local"
    return kind.reads in ("weights", "forward")
