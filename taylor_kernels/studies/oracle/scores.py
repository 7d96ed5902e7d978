"""What each criterion says of the filters, and what it costs beside a plain training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from taylor_kernels.criteria import get_criterion
from taylor_kernels.importance import Importance
from taylor_kernels.statistics import Statistic, get_statistic
from taylor_kernels.statistics.activation_gradients import scoring
from taylor_kernels.studies.digest import digest
from taylor_kernels.studies.oracle.problem import Batch, Problem

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.results import Json

#: `random` is not one ranking but all of them: its figures are means over so many draws.
DRAWS = 20
#: The step that runtimes are compared with.
PLAIN = "forward + backward"


class CannotScore(ValueError):
    """A criterion does not apply to this model; the message says why."""


def scores_of(
    problem: Problem, criterion: str, settings: Json, cache: Cache, log: ProgressLog
) -> np.ndarray:
    """[draws, F] float64: one row, of `random` several; nan for filters that have no score.

    Raises:
        CannotScore: the criterion has nothing to read here.
    """
    if _statistic(criterion).drawn:
        return _draws(problem)
    piece = cache.piece("scores", settings | {"criterion": criterion}, by=code_of(criterion))
    values = piece.load()
    if values is None:
        with log.task(f"{problem.name}: {criterion}", len(problem.batches)) as advance:
            values = score(problem, criterion, advance).tolist()
        piece.save(values)
    return np.asarray([values], dtype=np.float64)


def score(
    problem: Problem, criterion: str, advance: Callable[[], None] = lambda: None
) -> np.ndarray:
    """[F] float64: the scores over one pass of `problem.batches`; of `random` the first draw.

    Raises:
        CannotScore: the criterion has nothing to read here.
    """
    if _statistic(criterion).drawn:
        return _draws(problem)[0]
    try:
        step = _Step(problem, criterion)
        try:
            for batch in problem.batches:
                step(batch)
                advance()
            assert step.meter is not None
            scores = step.meter.compute()
        finally:
            step.close()
    except (ValueError, RuntimeError) as error:
        raise CannotScore(str(error)) from error
    return torch.cat([scores[name] for name in problem.layers]).double().cpu().numpy()


def _statistic(criterion: str) -> type[Statistic]:
    return get_statistic(get_criterion(criterion).statistic)


def code_of(criterion: str) -> list[object]:
    """What scores by a criterion: also the function and the statistic of a user's own."""
    return [score, get_criterion(criterion).score, _statistic(criterion)]


def _draws(problem: Problem) -> np.ndarray:
    """[DRAWS, F], other ones for every network."""
    generator = np.random.default_rng(int(digest(problem.name), 16))
    return generator.random((DRAWS, len(problem.filters)))


class _Step:
    """One minibatch: passes as far as a criterion needs them, then its update().

    Without a criterion it is the plain step that all are compared with: forward and backward.
    """

    def __init__(self, problem: Problem, criterion: str | None) -> None:
        self.problem = problem
        # The plain step computes what the most demanding pass does.
        self.reads = "weight gradients" if criterion is None else _statistic(criterion).reads
        self.meter: Importance | None = None
        if criterion is not None:
            self.meter = Importance(problem.model, criterion, layers=problem.layers)

    def __call__(self, batch: Batch) -> None:
        problem, model = self.problem, self.problem.model
        closure = None
        if self.reads == "closure":
            closure = partial(problem.loss_of, batch)
        elif self.reads == "forward":
            with torch.no_grad():
                problem.loss_of(batch)
        elif self.reads != "weights":
            full = self.reads == "weight gradients"
            mode: AbstractContextManager = nullcontext() if full else scoring(model)
            with mode:
                problem.loss_of(batch).backward()
        if self.meter is not None:
            self.meter.update(closure=closure)
        model.zero_grad(set_to_none=True)

    def close(self) -> None:
        if self.meter is not None:
            self.meter.close()
        self.problem.model.zero_grad(set_to_none=True)


def timings(
    problem: Problem, criteria: Sequence[str], log: ProgressLog, *, rounds: int, seconds: float
) -> dict[str, Json]:
    """What a minibatch costs under each criterion, and under PLAIN, the plain step.

    Medians over rounds; in a round everyone has its turn, one minibatch to warm up and two that
    count, in an order that turns around every time, so that a machine that slows down slows all.

    Args:
        rounds: at most so many, of which one is done whatever it takes.
        seconds: no further round is begun after this.

    Returns:
        Name -> {"ms": median, "ratio": to the plain step}, on a GPU "peak_mib" too.
    """
    times: dict[str, list[float]] = {name: [] for name in (PLAIN, *criteria)}
    peaks = dict.fromkeys(times, 0.0)
    start = time.perf_counter()
    with log.task(f"{problem.name}: runtimes", rounds) as advance:
        for number in range(rounds):
            for name in list(times)[:: 1 if number % 2 == 0 else -1]:
                for taken, peak in _turn(problem, None if name == PLAIN else name, number):
                    times[name].append(taken)
                    peaks[name] = max(peaks[name], peak)
            advance()
            if time.perf_counter() - start > seconds:
                break
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {"ms": value * 1e3, "ratio": value / median[PLAIN]}
        | ({"peak_mib": peaks[name] / 2**20} if peaks[name] else {})
        for name, value in median.items()
    }


def _turn(problem: Problem, criterion: str | None, number: int) -> Iterator[tuple[float, float]]:
    """Seconds and peak bytes (0 on the CPU, which does not tell) of two minibatches."""
    device = next(problem.model.parameters()).device
    step = _Step(problem, criterion)
    try:
        for repeat in range(3):
            batch = problem.batches[(2 * number + repeat) % len(problem.batches)]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            if repeat:
                yield taken, float(peak)
    finally:
        step.close()
