"""Pruning curves: what goes when, that it is really gone, and that it stays away in training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="compare needs SciPy")

from taylor_kernels.criteria import get_criterion
from taylor_kernels.studies.oracle import curves
from taylor_kernels.studies.oracle.scores import score
from tests.helpers.problems import WIDTHS, small_problem

pytestmark = pytest.mark.usefixtures("one_thread")


def order_of(problem, values) -> list:
    return curves.removal_order(np.asarray(values), problem.filters)


def really_without(problem, filters) -> dict[str, float]:
    """The problem judged with these filters' weights, shifts and biases at zero."""
    model = copy.deepcopy(problem.model)
    with torch.no_grad():
        for name, number in filters:
            layer = model.get_submodule("1" if name == "0" else name)
            layer.weight[number] = layer.bias[number] = 0
    return problem.test_figures(model)


def test_nothing_removed_is_the_dense_network():
    problem = small_problem()
    (point,) = curves.one_shot(problem, order_of(problem, score(problem, "taylor_fo_bn")), [0])
    assert point == {"removed": 0, **problem.test_figures()}


def test_removed_filters_are_really_gone():
    problem = small_problem()
    order = order_of(problem, np.random.default_rng().random(len(problem.filters)))
    counts = [1, 5, 12, len(order)]
    for point, count in zip(curves.one_shot(problem, order, counts), counts, strict=True):
        expected = really_without(problem, order[:count])
        assert point["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert point["accuracy"] == expected["accuracy"]
    assert not any(m._forward_hooks for m in problem.model.modules())


def test_the_best_filter_of_each_layer_stays_and_ties_go_by_place():
    problem = small_problem()
    values = np.arange(len(problem.filters), dtype=float)
    order = order_of(problem, values)
    best = {name: (name, width - 1) for name, width in WIDTHS.items()}
    assert order == [one for one in problem.filters if one not in best.values()]
    assert order_of(problem, np.zeros_like(values)) == order


def test_counts_go_evenly_to_the_last_and_have_one_half():
    assert curves.counts(96, 3, 18)[:3] == [0, 5, 10]
    assert curves.counts(96, 3, 18)[-1] == round(0.9 * 96)
    for total in (1, 7, 97, 336):
        for points in (1, 4, 18):
            found = curves.counts(total, 1, points)
            assert found == sorted(set(found))
            assert {0, total // 2} <= set(found)


def test_no_point_of_a_curve_claims_filters_that_cannot_go():
    problem = small_problem()
    most = len(problem.filters) - len(WIDTHS)
    counts = curves.counts(len(problem.filters), len(WIDTHS), 8, last=1.0)
    order = order_of(problem, np.arange(len(problem.filters)))
    assert counts[-1] == most == len(order)
    assert curves.counts(40, 20, 10)[-1] == 20  # twenty layers of two


def test_norms_are_ranked_relative_to_their_layer_and_taylor_scores_as_they_are():
    values = np.random.default_rng().random((2, 7))
    layers = np.array(["a"] * 3 + ["b"] * 4)
    assert np.array_equal(curves.ranked(get_criterion("taylor_fo_bn"), values, layers), values)
    alive = np.array([True, True, False, True, False, True, True])
    found = curves.ranked(get_criterion("magnitude_l2"), values, layers, alive)
    for part, here in ((slice(3), alive[:3]), (slice(3, 7), alive[3:])):
        mean = values[:, part][:, here].mean(1, keepdims=True)
        np.testing.assert_allclose(found[:, part], values[:, part] / mean)


def test_a_criterion_that_does_not_change_gives_the_same_scored_again():
    problem = small_problem()
    order = order_of(problem, score(problem, "random"))
    counts = [3, 9, 15]
    again = curves.rescored(problem, "random", counts)
    assert again == curves.one_shot(problem, order, [0, *counts])


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_so_diag", "magnitude_l2"])
def test_scored_again_is_scored_on_the_network_as_it_is_by_then(criterion):
    problem = small_problem()
    first = order_of(
        problem,
        curves.ranked(
            get_criterion(criterion),
            score(problem, criterion),
            np.array([name for name, _ in problem.filters]),
        ),
    )[:6]
    shrunk = copy.deepcopy(problem.model)
    with torch.no_grad():
        for name, number in first:
            layer = shrunk.get_submodule("1" if name == "0" else name)
            layer.weight[number] = layer.bias[number] = 0
    smaller = small_problem(trained=False)
    object.__setattr__(smaller, "model", shrunk)
    for field in ("batches", "oracle_batches", "test_batches"):
        object.__setattr__(smaller, field, getattr(problem, field))
    values = score(smaller, criterion)
    alive = np.array([one not in set(first) for one in problem.filters])
    layers = np.array([name for name, _ in problem.filters])
    values = np.where(
        alive, curves.ranked(get_criterion(criterion), values, layers, alive), -np.inf
    )
    expected = really_without(problem, order_of(problem, values)[:11])
    point = curves.rescored(problem, criterion, [6, 11])[-1]
    assert point["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_oracle_removes_what_changes_the_loss_least_time_and_again():
    problem = small_problem()
    gone: list = []
    before = problem.mean_loss()
    for point in curves.rescored(problem, "oracle", [1, 2, 3])[1:]:
        left = [one for one in problem.filters if one not in gone]
        losses = {one: really_without(problem, [*gone, one])["loss"] for one in left}
        least = min((loss - before) ** 2 for loss in losses.values())
        assert (point["loss"] - before) ** 2 == pytest.approx(least, rel=1e-2, abs=1e-9)
        gone.append(min(left, key=lambda one: abs(losses[one] - point["loss"])))
        before = point["loss"]


def test_training_between_steps_leaves_the_removed_away_and_the_problem_alone():
    problem = small_problem()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    gone, trained, losses = [], [], []

    def train(model) -> None:
        trained.append(model)
        model.train()
        outputs = {}

        def keep(module, inputs, output) -> None:
            outputs[module] = output.detach().clone()

        handles = [model[number].register_forward_hook(keep) for number in (1, 3, 8)]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for batch in problem.batches * 5:
            optimizer.zero_grad()
            problem.loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
        for handle in handles:
            handle.remove()
        channels = [y.transpose(0, 1).flatten(1) for y in outputs.values()]
        gone.append(sum(int((y == 0).all(1).sum()) for y in channels))
        model.eval()
        with torch.no_grad():
            each = [problem.loss(model(x), y).item() for x, y in problem.batches]
        losses.append(sum(each) / len(each))

    points = curves.rescored(problem, "magnitude_l2", [6, 12], train=train)
    assert gone == [6, 12]
    assert len(points) == 3
    assert all(model is trained[0] is not problem.model for model in trained)
    assert [point["loss"] for point in points[1:]] == pytest.approx(losses, rel=1e-5)
    untrained = curves.rescored(problem, "magnitude_l2", [6, 12])
    assert points[-1]["loss"] != pytest.approx(untrained[-1]["loss"], rel=1e-5)
    assert all(v.equal(before[name]) for name, v in problem.model.state_dict().items())
    assert not problem.model.training


def test_a_shortened_problem_has_about_as_many_examples_for_the_oracle():
    problem = small_problem()
    short = problem.shortened(2)
    assert len(short.batches) == len(short.oracle_batches) == 2
    assert short.test_batches is problem.test_batches
    assert len(problem.shortened(99).batches) == len(problem.batches)
