"""Pruning curves: a network's accuracy as filters go, the least important first.

Filters go one by one, as the oracle removes them, those that a skip connection adds up too: what
is compared are the very scores that are correlated. `tk.Pruner` removes coupled filters together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from taylor_kernels.criteria import Criterion, get_criterion
from taylor_kernels.statistics.loss_change import Filter, LossChange
from taylor_kernels.studies.oracle.problem import Problem
from taylor_kernels.studies.oracle.scores import score

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

Array = np.ndarray


def ranked(criterion: Criterion, scores: Array, layers: Array, alive: Array | None = None) -> Array:
    """Scores that can be ranked over all layers, as tk.Pruner ranks them.

    Those that mean nothing across layers (norms) are divided by their mean in the layer.

    Args:
        scores: [..., F]; layers: [F], the layer of each.
        alive: [F] bool, the filters whose mean it is; None for all.
    """
    if criterion.across_layers:
        return scores
    result = np.array(scores)
    for layer in dict.fromkeys(layers):
        inside = layers == layer
        counted = inside if alive is None else inside & alive
        mean = result[..., counted].mean(-1, keepdims=True)
        result[..., inside] /= np.where(mean > 0, mean, 1.0)
    return result


def removal_order(score: Array, filters: Sequence[Filter]) -> list[Filter]:
    """The filters as they go: by ascending score over all layers, ties by their place.

    The best filter of each layer is not among them: a layer without filters cuts the network off.
    """
    ascending = [filters[number] for number in np.argsort(score, kind="stable")]
    spared = {name: (name, number) for name, number in ascending}
    return [one for one in ascending if spared[one[0]] != one]


def counts(total: int, layers: int, points: int, last: float = 0.9) -> list[int]:
    """How many filters are gone at each point: evenly from none to `last`, one half among them,
    and no more than can go where one stays in each of the layers."""
    steps = {round(total * f) for f in np.linspace(0, last, points + 1)} | {total // 2}
    return sorted({min(step, total - layers) for step in steps})


def one_shot(problem: Problem, order: Sequence[Filter], counts: Sequence[int]) -> list[Json]:
    """The network on `problem.test_batches` without the first so many filters of an order.

    Returns:
        {"removed": count, "loss": ..., "accuracy": ...} per count; more than there are in `order`
        means all of it.
    """
    source = LossChange(problem.model, problem.scored)
    points = []
    try:
        problem.test_figures()  # shows which norm follows which layer
        for count in counts:
            with source.removed(order[:count]):
                points.append({"removed": count, **problem.test_figures()})
    finally:
        source.close()
    return points


def mean_one_shot(problem: Problem, rankings: Array, counts: Sequence[int]) -> list[Json]:
    """The mean, point by point, of the one-shot curves of several rankings, [draws, F]."""
    orders = [removal_order(ranking, problem.filters) for ranking in rankings]
    each = [one_shot(problem, order, counts) for order in orders]
    return [
        {key: sum(point[key] for point in points) / len(points) for key in points[0]}
        for points in zip(*each, strict=True)
    ]


def rescored(
    problem: Problem,
    criterion: str,
    counts: Sequence[int],
    *,
    train: Callable[[nn.Module], object] | None = None,
    advance: Callable[..., None] = lambda note="": None,
) -> list[Json]:
    """The same in steps: score what is left on the network as it is, remove the next, go on.

    Args:
        problem: its own network is not touched. The criterion sees its `batches`, the oracle its
            `oracle_batches`.
        criterion: a name; "oracle" removes every filter that is left, at every step.
        train: trains the network in place after every step; what is removed stays away.
        advance: called after every step with a note.
    """
    problem = replace(problem, model=copy.deepcopy(problem.model))
    model, filters = problem.model, problem.filters
    layers = np.array([name for name, _ in filters])
    source = LossChange(model, problem.scored)
    gone: set[Filter] = set()
    points = [{"removed": 0, **problem.test_figures()}]  # shows which norm follows which layer
    try:
        for count in counts:
            alive = np.array([one not in gone for one in filters])
            with source.removed(gone):
                if get_criterion(criterion).statistic == "loss_change":
                    left = [one for one, here in zip(filters, alive, strict=True) if here]
                    changes = dict(source.changes(problem.mean_loss, left))
                    values = np.array([changes.get(one, 0.0) for one in filters]) ** 2
                else:
                    values = score(problem, criterion)
            values = ranked(get_criterion(criterion), values, layers, alive)
            values[~alive] = -np.inf  # what is gone goes first
            gone = set(removal_order(values, filters)[:count])
            with source.removed(gone):
                if train is not None:
                    train(model)
                    model.eval()
                points.append({"removed": count, **problem.test_figures()})
            advance(criterion)
    finally:
        source.close()
    return points
