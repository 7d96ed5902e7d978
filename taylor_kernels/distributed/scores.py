"""What ranks exchange where each scores its own minibatches: sums of the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.round import Round, Ticks, shares_gradients
from taylor_kernels.statistics import Statistic


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
        # Of many ranks: float64 of one at a time.
        counts, totals, spreads = received.split([len(self._order), width, width], 1)
        self._check_alike(everyone, totals, self._at)
        total, count, spread = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        for rank in range(self._ranks.size):
            total += totals[rank]
            count += counts[rank].double()[self._layer_of]
            spread += spreads[rank]
        mean = total / count.where(count > 0, 1.0)
        for rank in range(self._ranks.size):
            of_rank = counts[rank].double()[self._layer_of]
            spread += (
                of_rank * (totals[rank].double() / of_rank.where(of_rank > 0, 1.0) - mean).square()
            )
        place = torch.cat([self._at[name] for name in self._sizes])
        found = dict(zip(self._order, counts.sum(0, dtype=torch.float64).tolist(), strict=True))
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
