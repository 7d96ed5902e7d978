"""The oracle: every filter, or a random sample of them, really removed, and the loss measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from taylor_kernels.statistics.loss_change import Filter, LossChange
from taylor_kernels.studies.oracle.problem import Problem

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.results import Json

#: What is evaluated is written at least this often; a killed run loses no more.
SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Sample:
    """The filters that the oracle removes.

    Attributes:
        filters: in the order of the problem's.
        total: how many filters there are.
        seed: of the draw.
        evaluation_seconds: how long one evaluation of the loss took when the sample was drawn.
    """

    filters: list[Filter]
    total: int
    seed: int
    evaluation_seconds: float

    @property
    def full(self) -> bool:
        return len(self.filters) == self.total

    def __str__(self) -> str:
        if self.full:
            return f"all {self.total:,} filters"
        count = f"{len(self.filters):,} of {self.total:,}"
        return f"{count} filters, chosen at random (seed {self.seed})"


def draw_sample(
    problem: Problem, settings: Json, cache: Cache, *, count: int | None, budget: float, seed: int
) -> Sample:
    """All filters if they fit the budget, else as many as do; `count` overrules it.

    How long an evaluation takes is measured once and kept with the piece, or a run that goes on
    would draw another sample.

    Args:
        settings: what the problem is, for the piece.
        budget: seconds.
    """
    piece = cache.piece("budget", settings | {"budget": budget}, by=[draw_sample])
    seconds = piece.made(lambda: _evaluation_seconds(problem))
    total = len(problem.filters)
    wanted = count if count is not None else int(budget / max(seconds, 1e-9))
    wanted = max(wanted, len(problem.layers))
    return Sample(stratified(problem.widths, wanted, seed), total, seed, seconds)


def stratified(widths: dict[str, int], count: int, seed: int) -> list[Filter]:
    """`count` filters (at most all), at least one of each layer, else in proportion to its width.

    A greater count takes the filters of a smaller one along, to within one of a layer.
    """
    total = sum(widths.values())
    count = max(min(count, total), len(widths))
    shares = {name: max(1, count * width // total) for name, width in widths.items()}
    # What rounding left over goes where most is missing; what it took is given back likewise.
    while (left := count - sum(shares.values())) != 0:
        step = 1 if left > 0 else -1
        open_ = [n for n in widths if (shares[n] < widths[n] if step > 0 else shares[n] > 1)]
        name = max(open_, key=lambda n: step * (count * widths[n] / total - shares[n]))
        shares[name] += step
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for name, width in widths.items():
        order = torch.randperm(width, generator=generator)
        chosen += [(name, number) for number in sorted(order[: shares[name]].tolist())]
    return chosen


def loss_changes(
    problem: Problem, filters: Sequence[Filter], settings: Json, cache: Cache, log: ProgressLog
) -> dict[Filter, float]:
    """Loss without the filter − loss with it, on `problem.oracle_batches`, for each of `filters`.

    What was evaluated before, in this run or in one that was killed, is not evaluated again.
    """
    piece = cache.piece("oracle", settings, by=[loss_changes])
    known: dict[str, dict[str, float]] = piece.load() or {}

    def value(name: str, number: int) -> float | None:
        return known.get(name, {}).get(str(number))

    todo = [one for one in filters if value(*one) is None]
    if todo:
        source = LossChange(problem.model, problem.scored)
        saved = start = time.perf_counter()
        try:
            with log.task(f"{problem.name}: oracle", len(filters)) as advance:
                advance(by=len(filters) - len(todo))
                changes = source.changes(problem.mean_loss, todo)
                for done, ((name, number), change) in enumerate(changes, start=1):
                    known.setdefault(name, {})[str(number)] = change
                    now = time.perf_counter()
                    advance(f"{done / (now - start):.1f} filters/s")
                    if now - saved > SAVE_SECONDS:
                        piece.save(known)
                        saved = now
        finally:
            source.close()
            piece.save(known)
    return {(name, number): known[name][str(number)] for name, number in filters}


def _evaluation_seconds(problem: Problem) -> float:
    problem.mean_loss()  # allocators and caches warm up
    start = time.perf_counter()
    problem.mean_loss()
    return time.perf_counter() - start
