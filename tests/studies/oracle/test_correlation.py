"""Coefficients against SciPy and by hand, their means within layers, and bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="compare needs SciPy")

from scipy import stats

from taylor_kernels.studies.oracle.correlation import LEAST, agreement, bootstrap, coefficients


def test_coefficients_by_hand():
    found = coefficients(np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 3, 2, 5, 4]))
    assert found == pytest.approx({"pearson": 0.8, "spearman": 0.8, "kendall": 0.6})


@pytest.mark.parametrize("n", [5, 40])
def test_coefficients_are_those_of_scipy_with_ties_and_without_filters_that_have_no_score(n):
    rng = np.random.default_rng()
    score, truth = rng.integers(0, n // 2, n).astype(float), rng.random(n)
    score[:2] = [0, n]  # not constant
    holes = np.full(3, np.nan)
    found = coefficients(np.concatenate([score, holes]), np.concatenate([truth, rng.random(3)]))
    assert found["pearson"] == pytest.approx(stats.pearsonr(score, truth)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(score, truth)[0])
    assert found["kendall"] == pytest.approx(stats.kendalltau(score, truth)[0])


@pytest.mark.parametrize(
    ("score", "truth"),
    [
        (np.ones(9), np.arange(9.0)),
        (np.arange(9.0), np.zeros(9)),
        (np.arange(LEAST - 1.0), np.arange(LEAST - 1.0)),
        (np.full(9, np.nan), np.arange(9.0)),
    ],
    ids=["constant score", "constant truth", "too few", "no score"],
)
def test_what_has_no_order_has_no_coefficient(score, truth):
    assert all(math.isnan(value) for value in coefficients(score, truth).values())
    assert all(math.isnan(end) for ends in bootstrap(score, truth).values() for end in ends)


def test_within_layers_is_the_mean_over_those_that_are_wide_enough():
    rng = np.random.default_rng()
    layers = ["a"] * 10 + ["b"] * 20 + ["c"] * (LEAST - 1)
    truth, score = rng.random(len(layers)), rng.random(len(layers))
    found = agreement(score[None], truth, layers)
    each = [coefficients(score[part], truth[part]) for part in (slice(10), slice(10, 30))]
    assert found["layers"] == 2
    assert found["filters"] == len(layers)
    for name, value in found["within"].items():
        assert value == pytest.approx((each[0][name] + each[1][name]) / 2)
    assert found["all"] == coefficients(score, truth)


def test_order_within_layers_and_over_all_are_different_things():
    truth = np.concatenate([np.arange(20.0), 100 + np.arange(20.0)])
    score = np.concatenate([50 + np.arange(20.0), np.arange(20.0)])  # layers the wrong way round
    found = agreement(score[None], truth, ["a"] * 20 + ["b"] * 20)
    assert found["within"]["spearman"] == pytest.approx(1)
    assert found["all"]["spearman"] < 0


def test_draws_are_averaged():
    rng = np.random.default_rng()
    truth, draws = rng.random(30), rng.random((4, 30))
    found = agreement(draws, truth, ["a"] * 30)
    each = [coefficients(draw, truth)["spearman"] for draw in draws]
    assert found["draws"] == pytest.approx(each)
    assert found["all"]["spearman"] == pytest.approx(np.mean(each))
    assert "interval" not in found


def test_bootstrap_is_the_coefficient_of_resamples():
    rng = np.random.default_rng()
    score = rng.random(25)
    truth = score + 0.5 * rng.random(25)
    chosen = np.random.default_rng(0).integers(25, size=(60, 25))
    expected = [stats.spearmanr(score[one], truth[one])[0] for one in chosen]
    found = bootstrap(score, truth, resamples=60)
    assert found["spearman"] == pytest.approx(np.percentile(expected, (2.5, 97.5)))
    low, high = found["pearson"]
    assert low < stats.pearsonr(score, truth)[0] < high


def test_bootstrap_narrows_with_filters_and_is_the_same_twice():
    rng = np.random.default_rng()
    score = rng.random(2000)
    truth = score + rng.random(2000)
    few, many = (bootstrap(score[:n], truth[:n])["spearman"] for n in (20, 2000))
    assert many[1] - many[0] < few[1] - few[0]
    assert bootstrap(score[:20], truth[:20])["spearman"] == few
    assert bootstrap(score, score)["spearman"] == pytest.approx([1, 1])
