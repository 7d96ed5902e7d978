"""The pruning curves of a network: one for each criterion and kind, each kept as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np

from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.digest import digest
from taylor_kernels.studies.oracle import curves
from taylor_kernels.studies.oracle.findings import UNSCALED
from taylor_kernels.studies.oracle.problem import Problem
from taylor_kernels.studies.oracle.scores import code_of
from taylor_kernels.studies.oracle.settings import FineTuning, MeasurementPlan
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import Json

#: Of `random` the mean of so many curves is shown.
CURVE_DRAWS = 5
#: With fewer points than this a curve is not worth its time.
_LEAST_POINTS = 4
#: A pass of scoring takes about as long as so many evaluations of the loss on the same data.
_STEP_COST = 3


class PruningCurves:
    """The curves of one network.

    Args:
        identity: what decides the network's figures.
        rankings: criterion -> [draws, F]; those without a score for every filter have no curve.
        seconds: what an evaluation of the loss takes.
    """

    def __init__(
        self,
        problem: Problem,
        plan: MeasurementPlan,
        identity: Json,
        rankings: Mapping[str, np.ndarray],
        seconds: float,
        cache: Cache,
        log: ProgressLog,
    ) -> None:
        self.problem, self.plan, self.identity = problem, plan, identity
        self.rankings = {
            name: values[:CURVE_DRAWS]
            for name, values in rankings.items()
            if np.isfinite(values).all()
        }
        self.seconds, self.cache, self.log = seconds, cache, log

    def measured(self) -> dict[str, Json]:
        """ "one_shot", "rescored" and "finetuned" -> criterion -> points, as far as they go."""
        plan, name = self.plan, self.problem.name
        evaluations = sum(len(values) for values in self.rankings.values())
        points = min(plan.points, int(plan.budget / max(self.seconds * evaluations, 1e-9)))
        if points < _LEAST_POINTS:
            self.log.say(f"{name}: no pruning curves, the budget is too small for them")
            return {}
        problem = self.problem
        counts = curves.counts(len(problem.filters), len(problem.layers), points)
        chosen = [one for one in plan.rescored if one in self.rankings]
        share = min(1.0, plan.minibatches / len(problem.batches))
        if _STEP_COST * self.seconds * share * len(chosen) * points > plan.budget:
            self.log.say(f"{name}: no re-scored pruning curves, the budget is too small for them")
            chosen = []
        found: dict[str, Json] = {"one_shot": self._one_shot(counts)}
        found["rescored"] = self._rescored(chosen, counts, found["one_shot"])
        found["finetuned"] = self._finetuned(chosen, counts)
        return found

    def _one_shot(self, counts: Sequence[int]) -> Json:
        found = {}
        with self.log.task(f"{self.problem.name}: one-shot pruning", len(self.rankings)) as advance:
            for name, rankings in self.rankings.items():
                settings = self.identity | {"ranking": digest(rankings.tobytes()), "counts": counts}
                piece = self.cache.piece("one_shot", settings, by=[curves.mean_one_shot])
                make = partial(curves.mean_one_shot, self.problem, rankings, counts)
                found[name] = piece.made(make)
                advance(name)
        return found

    def _rescored(self, chosen: Sequence[str], counts: Sequence[int], one_shot: Json) -> Json:
        """Those whose scores cannot change have the curve that they have in one shot."""
        found: Json = {}
        if not chosen:
            return found
        with self._task("pruning, re-scored", chosen, counts) as advance:
            for name in chosen:
                criterion = get_criterion(name)
                statistic = get_statistic(criterion.statistic)
                if statistic.drawn:
                    found[name] = one_shot[name]
                    continue
                if statistic.reads == "weights" and not criterion.across_layers:
                    plain = UNSCALED.format(name)
                    found[plain] = one_shot[plain]
                found[name] = self._stepwise("rescored", name, counts, None, advance)
        return found

    def _finetuned(self, chosen: Sequence[str], counts: Sequence[int]) -> Json:
        if self.plan.training is None or not chosen:
            return {}
        with self._task("pruning and training", chosen, counts) as advance:
            return {
                name: self._stepwise("finetuned", name, counts, self.plan.training, advance)
                for name in chosen
            }

    def _task(
        self, label: str, chosen: Sequence[str], counts: Sequence[int]
    ) -> AbstractContextManager[Callable[..., None]]:
        return self.log.task(f"{self.problem.name}: {label}", len(chosen) * len(counts[1:]))

    def _stepwise(
        self,
        kind: str,
        criterion: str,
        counts: Sequence[int],
        training: FineTuning | None,
        advance: Callable[..., None],
    ) -> list[Json]:
        minibatches = self.plan.minibatches
        settings = self.identity | {
            "criterion": criterion,
            "counts": counts,
            "minibatches": minibatches,
            "training": None if training is None else training.settings,
        }
        by = [curves.rescored, *code_of(criterion), *(() if training is None else training.by)]
        make = partial(
            curves.rescored,
            self.problem.shortened(minibatches),
            criterion,
            counts[1:],
            train=None if training is None else training.train,
            advance=advance,
        )
        return self.cache.piece(kind, settings, by=by).made(make)
