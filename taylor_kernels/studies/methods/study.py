"""The frame of every method's study: ways of making a network smaller, each run on each problem.

A `Way` is a function of a `Trial`, which is one network on one data set under one seed. What it
returns is kept under a key of all that decides it, so that a study that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from taylor_kernels.studies.methods.problems import DATA, NETWORKS, Data
from taylor_kernels.studies.training import Schedule
from taylor_kernels.studies.weights import trained_network

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache
    from taylor_kernels.studies.plotting import Plot
    from taylor_kernels.studies.progress import Advance, ProgressLog
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json

#: Networks this small are slower on more threads, and then results depend on their number.
THREADS = 1


@dataclass(frozen=True)
class Trial:
    """One network on one data set under one seed."""

    network: str
    data_name: str
    seed: int
    data: Data
    cache: Cache
    log: ProgressLog
    advance: Advance

    def untrained(self) -> nn.Module:
        """A new network, with the same start whenever it is asked for."""
        torch.manual_seed(self.seed)
        return NETWORKS[self.network](self.data.train.images.shape[1:])

    def trained(self, schedule: Schedule) -> nn.Module:
        """A new network, trained plainly; an earlier run's weights where they are kept."""
        return trained_network(
            self.untrained,
            self.seed,
            self.data.train,
            schedule,
            self.cache,
            self.log,
            label=f"{self.network}, {self.data_name}, {self.seed}: dense",
        ).model

    def generator(self) -> torch.Generator:
        """What draws the order of the minibatches; the same for each way."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Way:
    """One way of making the network smaller, or a baseline of it.

    Attributes:
        run: gives plain JSON with "accuracy" (of the test split, 0 to 1) at least; it is told the
            trial and `settings`, and may call `trial.advance(note)`.
        settings: plain JSON, or by problem: `{("LeNet-5", "digits"): {...}}` in `of_problem`, which
            replaces entries of `settings`.
    """

    run: Callable[[Trial, Mapping[str, Any]], Json]
    settings: Mapping[str, Any] = field(default_factory=dict)
    of_problem: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    def settings_of(self, problem: tuple[str, str]) -> dict[str, Any]:
        return {**self.settings, **self.of_problem.get(problem, {})}


@dataclass(frozen=True)
class Search:
    """Settings of a way that are tried before one is chosen, on seeds that are not reported.

    Attributes:
        problem: (network, data).
        way: a label of the study's.
        tried: each replaces entries of the way's settings.
        seeds: the same for all ways that are compared.
    """

    problem: tuple[str, str]
    way: str
    tried: Sequence[Mapping[str, Any]]
    seeds: Sequence[int] = (10, 11)


@dataclass(frozen=True)
class MethodStudy:
    """How a method is proven.

    Attributes:
        name: of the study, of its file of results and of its plot.
        method: as a table names it.
        removes: what it takes away, in a few words.
        source: the paper.
        file: of the package, that has the method.
        problems: (network, data) pairs, names of `problems.NETWORKS` and `problems.DATA`.
        ways: label -> way; the first is the method.
        table: all results in one table.
        plot: drawn into `<name>.png`.
        summary: "accuracy" and "compression" in words, for the table over all methods.
        more: further tables by name, each for a place of its own in the documentation.
        speed: measures the method's kernels or step: plain JSON with "words" for that table.
        searches: by which settings were chosen; `python -m bench.methods <name> --search`.
    """

    name: str
    method: str
    removes: str
    source: str
    file: str
    problems: Sequence[tuple[str, str]]
    ways: Mapping[str, Way]
    table: Callable[[Json], Table]
    plot: Callable[[Json], Plot]
    summary: Callable[[Json], Mapping[str, str]]
    more: Mapping[str, Callable[[Json], Table]] = field(default_factory=dict)
    speed: Callable[[], Json] | None = None
    searches: Sequence[Search] = ()


def run(
    study: MethodStudy,
    cache: Cache,
    log: ProgressLog,
    *,
    seeds: int = 3,
    ways: Sequence[str] = (),
    problems: Sequence[tuple[str, str]] = (),
) -> list[Json]:
    """Every way on every problem for seeds 0, 1, ...: what each found, with its circumstances.

    Args:
        ways, problems: some of the study's; by default all.
    """
    with _few_threads():
        return [
            _one(study, problem, way, seed, cache, log)
            for problem in problems or study.problems
            for seed in range(seeds)
            for way in ways or study.ways
        ]


def search(
    study: MethodStudy,
    cache: Cache,
    log: ProgressLog,
    *,
    ways: Sequence[str] = (),
    problems: Sequence[tuple[str, str]] = (),
) -> list[Json]:
    """Every setting of the study's searches on every seed of theirs, and its accuracy.

    Args:
        ways, problems: some of those that are searched; by default all.
    """
    found = []
    with _few_threads():
        for each in study.searches:
            if each.way in (ways or study.ways) and each.problem in (problems or study.problems):
                for tried in each.tried:
                    for seed in each.seeds:
                        one = _one(study, each.problem, each.way, seed, cache, log, tried)
                        names = ("way", "network", "data", "seed", "accuracy", "seconds")
                        found.append({name: one[name] for name in names} | {"tried": dict(tried)})
    return found


@contextmanager
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _one(
    study: MethodStudy,
    problem: tuple[str, str],
    label: str,
    seed: int,
    cache: Cache,
    log: ProgressLog,
    tried: Mapping[str, Any] = MappingProxyType({}),
) -> Json:
    way = study.ways[label]
    network, data_name = problem
    settings = {**way.settings_of(problem), **tried}
    facts = {"way": label, "network": network, "data": data_name, "seed": seed}
    key = facts | {
        "settings": settings,
        "threads": THREADS,
        "torch": torch.__version__,
    }
    piece = cache.piece(study.name, key, by=[way.run, NETWORKS[network], DATA[data_name], _one])

    def make() -> Json:
        start = time.perf_counter()
        with log.task(f"{label}: {network}, {data_name}, {seed}") as advance:
            data = DATA[data_name](seed)
            trial = Trial(network, data_name, seed, data, cache, log, advance)
            found = way.run(trial, settings)
            advance(f"accuracy {found['accuracy']:.2%}")
        return facts | {"settings": settings} | found | {"seconds": time.perf_counter() - start}

    return piece.made(make)


def schedule_facts(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain JSON, of which `Schedule(**facts)` makes one again."""
    return asdict(schedule)
