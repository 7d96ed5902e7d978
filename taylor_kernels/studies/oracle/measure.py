"""One network's share of a result: oracle, scores, how they agree, pruning curves, runtimes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from taylor_kernels.criteria import get_criterion
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.digest import digest_tensors
from taylor_kernels.studies.oracle.correlation import agreement
from taylor_kernels.studies.oracle.curves import ranked
from taylor_kernels.studies.oracle.findings import UNSCALED
from taylor_kernels.studies.oracle.oracle import Sample, draw_sample, loss_changes
from taylor_kernels.studies.oracle.problem import Problem, loss_and_accuracy
from taylor_kernels.studies.oracle.pruning_curves import PruningCurves
from taylor_kernels.studies.oracle.scores import CannotScore, scores_of, timings
from taylor_kernels.studies.oracle.settings import MeasurementPlan
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import Json, rounded
from taylor_kernels.studies.source_code import code_digest
from taylor_kernels.tracing.run.running import tensors_in

ORACLE = "oracle"


def measure(problem: Problem, plan: MeasurementPlan, cache: Cache, log: ProgressLog) -> Json:
    """The result of a network, as plain JSON; every finished part is kept in `cache`.

    Raises:
        CannotScore: a criterion does not apply, and the plan is strict.
    """
    return rounded(_Measurement(problem, plan, cache, log).result())


def identity(problem: Problem) -> Json:
    """All that decides the figures of a network but the code that computes them, which is part of
    each piece's key."""
    model = problem.model
    return {
        "name": problem.name,  # random scores are drawn by it
        "weights": digest_tensors(tensors_in(model.state_dict())),
        "data": [
            digest_tensors(t for batch in batches for t in tensors_in(batch))
            for batches in (problem.batches, problem.oracle_batches, problem.test_batches)
        ],
        "minibatches": len(problem.batches),
        "layers": list(problem.layers),
        "origin": problem.origin,
        "code": code_digest(model, problem.loss),
        "torch": torch.__version__,
        "device": next(model.parameters()).device.type,
    }


class _Measurement:
    """A network under way: what `measure` does, step by step."""

    def __init__(
        self, problem: Problem, plan: MeasurementPlan, cache: Cache, log: ProgressLog
    ) -> None:
        self.problem, self.plan, self.cache, self.log = problem, plan, cache, log
        self.settings = identity(problem)
        self.filters = problem.filters
        self.layers = np.array([name for name, _ in self.filters])

    def result(self) -> Json:
        problem, plan = self.problem, self.plan
        loss = self._loss()
        sample = draw_sample(
            problem,
            self.settings,
            self.cache,
            count=plan.sample,
            budget=plan.budget,
            seed=plan.seed,
        )
        self.log.say(f"{problem.name}: the oracle removes {sample}")
        changes = loss_changes(problem, sample.filters, self.settings, self.cache, self.log)
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
        curves = PruningCurves(
            problem, plan, self.settings, rankings, sample.evaluation_seconds, self.cache, self.log
        )
        for kind, found in curves.measured().items():
            for name, curve in found.items():
                criteria[name][kind] = curve
        if plan.keep_scores:
            for name in criteria.keys() - {ORACLE}:
                criteria[name]["scores"] = rankings[name][0].tolist()
        return {
            "name": problem.name,
            "widths": problem.widths,
            "classifies": problem.classifies,
            "data": problem.facts(),
            "dense": problem.test_figures(),
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
            each = (
                loss_and_accuracy(model, [b], of, classifies=False)["loss"]
                for b in self.problem.oracle_batches
            )
            where, value = next((n, one) for n, one in enumerate(each) if not math.isfinite(one))
            raise CannotScore(f"--data: the loss is {value} on minibatch {where}, not a number")
        return loss

    def _scores(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Criterion -> [draws, F]; and criterion -> why it has none."""
        scores, skipped = {}, {}
        for name in self.plan.criteria:
            try:
                scores[name] = scores_of(self.problem, name, self.settings, self.cache, self.log)
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
            found[name] = ranked(criterion, values, self.layers)
            if not criterion.across_layers:
                found[UNSCALED.format(name)] = values
        return found

    def _agreements(self, rankings: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, Json]:
        seen = np.isfinite(truth)
        return {
            name: agreement(values[:, seen], truth[seen], self.layers[seen])
            for name, values in rankings.items()
        }

    def _runtimes(self, criteria: Sequence[str]) -> Json | None:
        plan = self.plan
        if not plan.rounds:
            return None
        settings = self.settings | {"criteria": list(criteria), "rounds": plan.rounds}
        settings["threads"] = torch.get_num_threads()
        make = partial(
            timings, self.problem, criteria, self.log, rounds=plan.rounds, seconds=plan.seconds
        )
        return self.cache.piece("runtimes", settings, by=[timings]).made(make)

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
