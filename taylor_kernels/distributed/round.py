"""A round: the minibatches that the ranks have seen since they met last, and what they exchange.

A rank's payload, of the same length on all of them:

    int64 [2]        what it is of, and how many minibatches
    float64 [T, 3]   of each minibatch: its state, its weight, its examples
    float32 [...]    columns of each filter: tables of minibatches, or sums of scores over them
    uint8 [L]        of each layer: not read; rounding noise
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks, digest
from taylor_kernels.shards import is_sharded, part_count
from taylor_kernels.statistics import Statistic, held_weight

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

    def add(self, statistic: Statistic, tables: Sequence[Tensor], weight: float) -> None:
        """A minibatch of this rank: the table of every layer."""
        self._unread = statistic.unread
        self.noise |= frozenset(statistic.noise)
        known = [
            table for name, table in zip(self._sizes, tables, strict=True) if name not in self.noise
        ]
        # What nan may mean in these tables is not a gradient that overflowed.
        device = tables[0].device
        finite = None
        if known and not self._kind.nan_means:
            finite = torch.stack([t.isfinite().all().to(device) for t in known]).all()
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


class TableRound(Round):
    """Tables that add up over the parts of a minibatch: T minibatches of K columns a filter.

    The parts of each minibatch are added in the order of ranks, and what is scored is their sum.
    """

    def _rows(self, tables: Sequence[Tensor]) -> Tensor:
        by_name = dict(zip(self._sizes, tables, strict=True))
        device = tables[0].device
        parts = [self._kind.shared(by_name[name]).to(device) for name in self._order]
        for name, part in zip(self._order, parts, strict=True):
            if part.size(1) != self._kind.shared_columns:
                raise ValueError(
                    f"statistic {self._kind.name!r}: {part.size(1)} columns of layer {name!r} are "
                    f"to be shared among the ranks, and its shared_columns is "
                    f"{self._kind.shared_columns}; set the class attribute"
                )
        return torch.cat([part.flatten() for part in parts]).float()

    def _columns(self, everyone: Ticks) -> Tensor:
        length = sum(self._sizes.values()) * self._kind.shared_columns
        rows = [tick.rows for tick in self._ticks]
        nothing = torch.zeros(length)
        return torch.stack([nothing if row is None else row.cpu() for row in rows])

    def exchange(self, device: torch.device) -> list[list[Tensor]]:
        """The tables of every minibatch that counts, each in the order of layers; a collective."""
        if not self._ticks:
            return []
        everyone, columns = self._exchange(guess=False)
        columns = columns.view(*everyone.state.shape, -1)
        if self._in_parts:
            factor = everyone.present
            if (factor.sum(0) < self._ranks.size).logical_and(everyone.counts).any():
                raise RuntimeError(
                    "absent: each rank holds a part of the weights, and of their gradients, so "
                    "that none can be absent; call update() or step() on all"
                )
        elif self._kind.across_ranks == "mean":
            factor = everyone.shares(everyone.examples)
        elif self._ranks.loss == "mean":
            factor = everyone.shares(everyone.weight)
        else:
            factor = everyone.present
        found = []
        for minibatch in everyone.counts.nonzero().flatten().tolist():
            total = torch.zeros(columns.size(2), dtype=torch.float64)
            for rank in range(self._ranks.size):
                if everyone.present[rank, minibatch]:
                    total += factor[rank, minibatch] * columns[rank, minibatch]
            found.append(self._tables(total.float().to(device)))
        return found

    def _tables(self, columns: Tensor) -> list[Tensor]:
        width = self._kind.shared_columns
        parts = columns.split([self._sizes[name] * width for name in self._order])
        by_name = {
            name: self._kind.unshared(part.view(-1, width))
            for name, part in zip(self._order, parts, strict=True)
        }
        return [by_name[name] for name in self._sizes]


def shares_gradients(kind: type[Statistic], ranks: Ranks) -> bool:
    """Whether every rank's table is that of the whole minibatch already."""
    if kind.reads == "weight gradients":
        return ranks.gradients != "local"
    return kind.reads in ("weights", "forward")


def exchanges_tables(statistic: Statistic, ranks: Ranks) -> bool:
    """Whether the ranks exchange tables, which they score then, or scores."""
    if statistic.spread is not None:
        return True
    return ranks.minibatch == "global" and statistic.across_ranks in ("sum", "mean")


def check_parts(statistic: Statistic, ranks: Ranks | None) -> None:
    """Weights of which a rank holds a part can be scored.

    Raises:
        ValueError: the ranks are missing, or others than those that hold the parts; or the
            criterion runs the model itself.
    """
    held = [held_weight(layer) for layer in statistic.layers.values()]
    if not any(map(is_sharded, held)):
        return
    if statistic.reads == "closure":
        raise ValueError(
            "criterion: it differentiates by weights, or runs the model, itself, which it cannot "
            "where a rank holds a part of them; use one that reads what backward() leaves"
        )
    if ranks is None:
        raise ValueError(
            "ranks: each rank holds a part of the weights (FSDP2 or tensor parallelism); pass "
            "ranks=tk.distributed.Ranks()"
        )
    if ranks.gradients == "local" or any(ranks.size % part_count(one) for one in held):
        raise ValueError(
            "ranks: the weights are spread over ranks, so that gradients are those of all, and "
            f"these {ranks.size} ranks have to hold all parts; pass the group of all of them"
        )


class ScoreRound(Round):
    """Scores that each rank has made of its own minibatches, summed over them.

    An example's gradient is a part of that of its rank's loss, of which the loss of the whole
    minibatch is a mean: what averaging over the ranks does to the others' share is made up for
    by the power of the gradients that the criterion's scores hold.
    """

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type]
        ranks, kind = self._ranks, self._kind
        self._alike = shares_gradients(kind, ranks)
        scaled = kind.across_ranks == "examples" and ranks.minibatch == "global"
        self._power = degree(self._criterion) if scaled and ranks.loss == "mean" else 0

    def _factors(self, everyone: Ticks) -> Tensor:
        """[R, T]: what scores are multiplied by."""
        if not self._power:
            return everyone.present
        return everyone.shares(everyone.weight) ** self._power

    def _check_alike(self, everyone: Ticks, columns: Tensor, layers: Mapping[str, Tensor]) -> None:
        """Scores that all ranks should have in common are the same, and others are not.

        Args:
            columns: [R, n].
            layers: layer -> the numbers of its scores.
        """
        if self._ranks.size == 1 or not everyone.present.all():
            return
        differing = []
        for name in sorted(layers):
            of_layer = columns[:, layers[name]].double()
            of_layer = of_layer.where(of_layer.isfinite(), 0.0)
            size = of_layer.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            if (of_layer - of_layer[0]).abs().amax() > 1e-3 * size:
                differing.append(name)
        if self._alike and differing:
            raise RuntimeError(
                f"{differing[0]}: its scores differ among the ranks ({len(differing)} of "
                f"{len(layers)} layers do), though gradients={self._ranks.gradients!r} says that "
                "every rank holds the same .grad; let backward() run through "
                "DistributedDataParallel and outside no_sync(), or pass "
                "Ranks(gradients='local')"
            )
        own = self._kind.reads == "weight gradients" and not self._alike
        if own and not differing and columns.any():
            raise RuntimeError(
                "Ranks: gradients='local' was said, but every rank holds the same ones; pass "
                "gradients='averaged', or give the ranks different minibatches"
            )


class TotalRound(ScoreRound):
    """Sums over observations, with which `Importance` goes on: two columns a filter.

    Of squares the second moment about the rank's mean is sent, which float32 holds though the mean
    may be a thousand times larger (Chan, Golub and LeVeque 1979); counts of layers go beside.
    """

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)
        sizes = torch.tensor([self._sizes[name] for name in self._order])
        self._layer_of = torch.arange(len(self._order)).repeat_interleave(sizes)
        starts = dict(zip(self._order, (sizes.cumsum(0) - sizes).tolist(), strict=True))
        self._at = {n: starts[n] + torch.arange(size) for n, size in self._sizes.items()}
        self._observed: list[list[int]] = []

    def add_scores(
        self, statistic: Statistic, tables: Sequence[Tensor], weight: float,
        scored: tuple[Tensor, Tensor, list[int]],
    ) -> None:  # fmt: skip
        """A minibatch: sums over its observations, of squares too, [F] each; counts of layers."""
        self._scored = scored
        self.add(statistic, tables, weight)

    def _rows(self, tables: Sequence[Tensor]) -> Tensor:
        total, squares, counts = self._scored
        count = torch.tensor(counts, dtype=torch.float64)
        sizes = torch.tensor([*self._sizes.values()])
        columns = (total.cpu(), squares.cpu(), count.repeat_interleave(sizes))
        rows = torch.stack(columns, 1)
        place = torch.cat([self._at[name] for name in self._sizes])
        ordered = torch.empty_like(rows)
        ordered[place] = rows
        return ordered

    def _columns(self, everyone: Ticks) -> Tensor:
        factors = self._factors(everyone)
        # Of what all ranks have in common one observation is made.
        part = everyone.shares(torch.ones_like(factors)) if self._alike else everyone.present
        sums = torch.zeros(len(self._layer_of), 3, dtype=torch.float64)
        scale = factors * (part if self._alike else 1.0)
        square = factors.square() * (part if self._alike else 1.0)
        mine = self._ranks.rank
        for number, tick in enumerate(self._ticks):
            if tick.rows is not None and everyone.present[mine, number]:
                by = (scale[mine, number], square[mine, number], part[mine, number])
                sums += tick.rows * torch.stack(by)
        total, squares, count = sums.unbind(1)
        spread = squares - total.square() / count.where(count > 0, 1.0)
        counts = torch.zeros(len(self._order), dtype=torch.float64)
        counts[self._layer_of] = count
        return torch.cat([counts, total, spread.clamp_min(0)]).float()

    def exchange(self) -> tuple[Tensor, Tensor, list[int], int]:
        """Sums, sums of squares, [F] float64; counts of layers; minibatches. A collective."""
        width = len(self._layer_of)
        everyone, received = self._exchange(guess=True)
        counts, totals, spreads = received.double().split([len(self._order), width, width], 1)
        self._check_alike(everyone, totals, self._at)
        total, count, spread = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        for rank in range(self._ranks.size):
            total += totals[rank]
            count += counts[rank][self._layer_of]
            spread += spreads[rank]
        mean = total / count.where(count > 0, 1.0)
        for rank in range(self._ranks.size):
            of_rank = counts[rank][self._layer_of]
            spread += of_rank * (totals[rank] / of_rank.where(of_rank > 0, 1.0) - mean).square()
        place = torch.cat([self._at[name] for name in self._sizes])
        found = dict(zip(self._order, counts.sum(0).tolist(), strict=True))
        of_layers = [round(found[name]) for name in self._sizes]
        squares = spread + total * mean
        return total[place], squares[place], of_layers, int(everyone.counts.sum())


class MeanRound(ScoreRound):
    """Scores of units, with which `Pruner` goes on: a column a unit.

    Args:
        units: layer -> the numbers of the units that it has filters in.
        count: how many units there are.
    """

    def __init__(
        self, *given: object, units: Mapping[str, Tensor], count: int, **named: object
    ) -> None:
        super().__init__(*given, **named)
        self._units, self._count = units, count

    def add_scores(
        self, statistic: Statistic, tables: Sequence[Tensor], weight: float, scores: Tensor
    ) -> None:
        """A minibatch: the scores of all units, [U], each a mean over observations."""
        self._scored = scores
        self.add(statistic, tables, weight)

    def _rows(self, tables: Sequence[Tensor]) -> Tensor:
        return self._scored

    def _columns(self, everyone: Ticks) -> Tensor:
        observations = everyone.examples if self._kind.per_example else everyone.present
        factors = self._factors(everyone) * everyone.shares(observations)
        total = torch.zeros(self._count, dtype=torch.float64)
        mine = self._ranks.rank
        for number, tick in enumerate(self._ticks):
            if tick.rows is not None and everyone.present[mine, number]:
                total += factors[mine, number] * tick.rows.cpu()
        return total.float()

    def exchange(self) -> tuple[Tensor, int]:
        """[U] float64: sums over the minibatches that count, and how many those are."""
        everyone, received = self._exchange(guess=True)
        self._check_alike(everyone, received, self._units)
        total = torch.zeros(self._count, dtype=torch.float64)
        for scores in received:
            total += scores
        return total, int(everyone.counts.sum())


def degree(criterion: Criterion) -> int:
    """The power of the gradients that a criterion's scores hold: 2 for a square, 1 for abs().

    Raises:
        ValueError: they hold none.
    """
    table = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    whole, half = criterion.observations(table), criterion.observations(table / 2)
    powers = ((whole / half).log() / math.log(2)).flatten()
    power = round(float(powers.mean()))
    if not torch.allclose(powers, torch.full_like(powers, power), atol=1e-6):
        raise ValueError(
            f"criterion: {criterion.name!r} scores examples by no power of their gradients, so "
            "parts of a minibatch cannot be weighed; pass Ranks(minibatch='local')"
        )
    return power
