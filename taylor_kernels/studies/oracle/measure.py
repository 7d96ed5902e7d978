"""One network's share of a result: oracle, scores, how they agree, pruning curves, runtimes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from taylor_kernels.criteria import get_criterion
from taylor_kernels.progress import ProgressLog
from taylor_kernels.pruning.model_run import tensors_in
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.oracle import curves
from taylor_kernels.studies.oracle.correlation import agreement
from taylor_kernels.studies.oracle.findings import UNSCALED
from taylor_kernels.studies.oracle.oracle import Sample, draw_sample, loss_changes
from taylor_kernels.studies.oracle.pieces import (
    Json,
    Pieces,
    digest_package,
    digest_source,
    digest_tensors,
    rounded,
)
from taylor_kernels.studies.oracle.problem import Problem, judge
from taylor_kernels.studies.oracle.scores import CannotScore, scores_of, timings

ORACLE = "oracle"
#: Of `random` the mean of so many curves is shown.
CURVE_DRAWS = 5
#: With fewer points than this a curve is not worth its time.
_LEAST_POINTS = 4
#: A pass of scoring takes about as long as so many evaluations of the loss on the same data.
_STEP_COST = 3


@dataclass(frozen=True)
class Training:
    """How a network is trained further between two prunings.

    Attributes:
        train: trains a model in place.
        settings: what decides it.
    """

    train: Callable[[nn.Module], object]
    settings: Json


@dataclass(frozen=True)
class Plan:
    """What is measured of a network.

    Attributes:
        criteria: the names.
        strict: a criterion that cannot score the model is an error, not a note.
        sample, budget, seed: as in `Settings`.
        points: of a pruning curve, at most.
        rescored: the criteria, "oracle" among them, that also score again at every point.
        minibatches: on which they do.
        training: after every point, in a further curve; None for none.
        rounds, seconds: of the runtimes; 0 rounds for none.
        keep_scores: put every filter's scores in the result.
    """

    criteria: Sequence[str]
    strict: bool
    sample: int | None
    budget: float
    seed: int
    points: int
    rescored: tuple[str, ...]
    minibatches: int
    training: Training | None
    rounds: int
    seconds: float
    keep_scores: bool


def measure(problem: Problem, plan: Plan, pieces: Pieces, log: ProgressLog) -> Json:
    """The result of a network, as plain JSON; every finished part is kept in `pieces`.

    Raises:
        CannotScore: a criterion does not apply, and the plan is strict.
    """
    return rounded(_Measurement(problem, plan, pieces, log).result())


def identity(problem: Problem) -> Json:
    """All that decides the figures of a network: what its pieces belong to."""
    model = problem.model
    return {
        "weights": digest_tensors(tensors_in(model.state_dict())),
        "data": [
            digest_tensors(t for batch in batches for t in tensors_in(batch))
            for batches in (problem.batches, problem.whole, problem.test)
        ],
        "minibatches": len(problem.batches),
        "layers": list(problem.layers),
        "origin": problem.origin,
        "code": [digest_package(), digest_source(model, problem.loss)],
        "torch": torch.__version__,
        "device": next(model.parameters()).device.type,
    }


class _Measurement:
    """A network under way: what `measure` does, step by step."""

    def __init__(self, problem: Problem, plan: Plan, pieces: Pieces, log: ProgressLog) -> None:
        self.problem, self.plan, self.pieces, self.log = problem, plan, pieces, log
        self.settings = identity(problem)
        self.filters = problem.filters
        self.layers = np.array([name for name, _ in self.filters])

    def result(self) -> Json:
        problem, plan = self.problem, self.plan
        loss = self._loss()
        sample = draw_sample(
            problem,
            self.settings,
            self.pieces,
            count=plan.sample,
            budget=plan.budget,
            seed=plan.seed,
        )
        self.log.say(f"{problem.name}: the oracle removes {sample}")
        changes = loss_changes(problem, sample.filters, self.settings, self.pieces, self.log)
        change = np.array([changes.get(one, np.nan) for one in self.filters])
        unknown = len(sample.filters) - int(np.isfinite(change).sum())
        if unknown:
            self.log.say(
                f"{problem.name}: without {unknown} of them, one at a time, the loss is not "
                "finite; these are left out"
            )
        scores, skipped = self._scores()
        rankings = self._rankings(scores)
        criteria = self._agreements(rankings, change**2)
        if sample.full:
            rankings[ORACLE] = change[None] ** 2
            criteria[ORACLE] = {}
        for kind, curves_ in self._curves(rankings, sample.evaluation_seconds).items():
            for name, curve in curves_.items():
                criteria[name][kind] = curve
        if plan.keep_scores:
            for name in criteria.keys() - {ORACLE}:
                criteria[name]["scores"] = rankings[name][0].tolist()
        return {
            "name": problem.name,
            "widths": problem.widths,
            "classifies": problem.classifies,
            "data": problem.facts(),
            "dense": problem.judged(),
            "oracle": self._oracle_facts(sample, change, loss),
            "criteria": criteria,
            "skipped": skipped,
            "runtimes": self._runtimes(list(scores)),
        }

    def _loss(self) -> float:
        """The loss that the oracle's changes are changes of.

        Raises:
            CannotScore: it is not finite; the message says where.
        """
        loss = self.problem.mean_loss()
        if not math.isfinite(loss):
            model, of = self.problem.model, self.problem.loss
            each = (judge(model, [b], of, classifies=False)["loss"] for b in self.problem.whole)
            where, value = next((n, one) for n, one in enumerate(each) if not math.isfinite(one))
            raise CannotScore(f"--data: the loss is {value} on minibatch {where}, not a number")
        return loss

    def _scores(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Criterion -> [draws, F]; and criterion -> why it has none."""
        scores, skipped = {}, {}
        for name in self.plan.criteria:
            try:
                scores[name] = scores_of(self.problem, name, self.settings, self.pieces, self.log)
            except CannotScore as error:
                if self.plan.strict:
                    raise CannotScore(
                        f"--criteria: {name} cannot score this model; {error}"
                    ) from None
                skipped[name] = str(error)
                self.log.say(f"{self.problem.name}: {name} is left out; {error}")
        if not scores:
            why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise CannotScore(f"--model: no criterion can score it ({why})")
        return scores, skipped

    def _rankings(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scores as the pruner ranks them; those that it scales, also as they are."""
        found = {}
        for name, values in scores.items():
            criterion = get_criterion(name)
            found[name] = curves.ranked(criterion, values, self.layers)
            if not criterion.across_layers:
                found[UNSCALED.format(name)] = values
        return found

    def _agreements(self, rankings: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, Json]:
        seen = np.isfinite(truth)
        return {
            name: agreement(values[:, seen], truth[seen], self.layers[seen])
            for name, values in rankings.items()
        }

    def _curves(self, rankings: dict[str, np.ndarray], seconds: float) -> dict[str, Json]:
        """ "one_shot", "rescored" and "finetuned" -> criterion -> points, as far as they go.

        Args:
            rankings: [draws, F]; a criterion needs a score for every filter.
            seconds: what an evaluation of the loss takes.
        """
        plan, name = self.plan, self.problem.name
        rankings = {one: values for one, values in rankings.items() if np.isfinite(values).all()}
        evaluations = sum(min(len(values), CURVE_DRAWS) for values in rankings.values())
        points = min(plan.points, int(plan.budget / max(seconds * evaluations, 1e-9)))
        if points < _LEAST_POINTS:
            self.log.say(f"{name}: no pruning curves, the budget is too small for them")
            return {}
        counts = curves.counts(len(self.filters), len(self.problem.layers), points)
        chosen = [one for one in plan.rescored if one in rankings]
        share = min(1.0, plan.minibatches / len(self.problem.batches))
        if _STEP_COST * seconds * share * len(chosen) * points > plan.budget:
            self.log.say(f"{name}: no re-scored pruning curves, the budget is too small for them")
            chosen = []
        found: dict[str, Json] = {"one_shot": {}, "rescored": {}, "finetuned": {}}
        with self.log.task(f"{name}: one-shot pruning", len(rankings)) as advance:
            for one, ranking in rankings.items():
                make = partial(self._one_shot, ranking, counts)
                found["one_shot"][one] = self._curve("one_shot", one, counts, {}, make)
                advance(one)
        for kind, training in (("rescored", None), ("finetuned", plan.training)):
            if not chosen or (kind == "finetuned" and training is None):
                continue
            label = "pruning, re-scored" if training is None else "pruning and training"
            with self.log.task(f"{name}: {label}", len(chosen) * len(counts[1:])) as advance:
                for one in chosen:
                    criterion = get_criterion(one)
                    statistic = get_statistic(criterion.statistic)
                    if statistic.drawn and training is None:
                        found[kind][one] = found["one_shot"][one]  # nothing to score again
                        continue
                    plain = UNSCALED.format(one)
                    unscaled = statistic.reads == "weights" and not criterion.across_layers
                    if unscaled and training is None:
                        found[kind][plain] = found["one_shot"][plain]  # weights stay as they are
                    make = partial(self._rescored, one, counts[1:], training, advance)
                    more = {"minibatches": plan.minibatches}
                    more |= {} if training is None else training.settings
                    found[kind][one] = self._curve(kind, one, counts, more, make)
        return found

    def _curve(
        self, kind: str, ranking: str, counts: Sequence[int], more: Json, make: Callable[[], Json]
    ) -> Json:
        settings = self.settings | {"ranking": ranking, "counts": counts, "more": more}
        return self.pieces.made(kind, settings, make)

    def _one_shot(self, ranking: np.ndarray, counts: Sequence[int]) -> list[Json]:
        """One curve, of several draws their mean, point by point."""
        orders = [curves.removal_order(score, self.filters) for score in ranking[:CURVE_DRAWS]]
        each = [curves.one_shot(self.problem, order, counts) for order in orders]
        return [
            {key: sum(point[key] for point in points) / len(points) for key in points[0]}
            for points in zip(*each, strict=True)
        ]

    def _rescored(
        self,
        criterion: str,
        counts: Sequence[int],
        training: Training | None,
        advance: Callable[..., None],
    ) -> list[Json]:
        return curves.rescored(
            self.problem.shortened(self.plan.minibatches),
            criterion,
            counts,
            train=None if training is None else training.train,
            advance=advance,
        )

    def _runtimes(self, criteria: Sequence[str]) -> Json:
        plan = self.plan
        if not plan.rounds:
            return None
        settings = self.settings | {"criteria": list(criteria), "rounds": plan.rounds}
        settings["threads"] = torch.get_num_threads()
        make = partial(
            timings, self.problem, criteria, self.log, rounds=plan.rounds, seconds=plan.seconds
        )
        return self.pieces.made("runtimes", settings, make)

    def _oracle_facts(self, sample: Sample, change: np.ndarray, loss: float) -> Json:
        """`not_finite`: without how many filters the loss is none; `falls`: the share of filters
        without which it is lower; `top_share`: how much of the oracle's sum the top twentieth of
        the filters has."""
        known = change[np.isfinite(change)]
        squares = np.sort(known**2)[::-1]
        top = squares[: max(1, len(squares) // 20)].sum() / max(squares.sum(), 1e-300)
        by_filter = dict(zip(self.filters, change.tolist(), strict=True))
        return {
            "filters": len(sample.filters),
            "total": sample.total,
            "seed": sample.seed,
            "evaluation_ms": sample.evaluation_seconds * 1e3,
            "loss": loss,
            "not_finite": len(sample.filters) - len(known),
            "falls": float((known < 0).mean()) if len(known) else math.nan,
            "top_share": float(top),
            "changes": {
                layer: [by_filter[layer, number] for number in range(width)]
                for layer, width in self.problem.widths.items()
            },
        }
