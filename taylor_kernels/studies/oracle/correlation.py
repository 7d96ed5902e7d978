"""How well scores agree with the oracle: Pearson, Spearman and Kendall, and how sure that is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

Array = np.ndarray

STATISTICS = ("pearson", "spearman", "kendall")
#: A layer with fewer filters than this says nothing about an order.
LEAST = 5
_RESAMPLES = 1000


def coefficients(score: Array, truth: Array) -> dict[str, float]:
    """The three coefficients of two [n] arrays; Kendall's is tau-b. nan if one of them is constant.

    The filters without a score (nan) are left out; fewer than `LEAST` others give nan.
    """
    seen = np.isfinite(score) & np.isfinite(truth)
    score, truth = score[seen], truth[seen]
    if len(score) < LEAST or np.ptp(score) == 0 or np.ptp(truth) == 0:
        return dict.fromkeys(STATISTICS, math.nan)
    functions: tuple[Callable, ...] = (stats.pearsonr, stats.spearmanr, stats.kendalltau)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant input: the figure stands for itself
        return {
            name: float(function(score, truth).statistic)
            for name, function in zip(STATISTICS, functions, strict=True)
        }


def agreement(scores: Array, truth: Array, layers: Sequence[str]) -> dict:
    """The coefficients over all layers, and their mean within layers.

    Args:
        scores: [draws, n]; the coefficients of several draws are averaged.
        truth: [n], the oracle's.
        layers: the layer of each filter.

    Returns:
        filters: how many have a score; all: the coefficients over all of them; within: their means
        over the layers that have at least `LEAST` filters with one, each layer counting once;
        layers: how many those are; interval: 95% bootstrap intervals over filters of `all`'s
        Pearson and Spearman, of one draw alone; draws: Spearman of each draw.
    """
    names = np.asarray(layers)
    each = [coefficients(one, truth) for one in scores]
    inside = {
        layer: [coefficients(one[names == layer], truth[names == layer]) for one in scores]
        for layer in dict.fromkeys(layers)
    }
    usable = [found for found in inside.values() if not math.isnan(found[0]["spearman"])]
    result = {
        "filters": int(np.isfinite(scores[0]).sum()),
        "all": _mean(each),
        "within": _mean([one for found in usable for one in found]),
        "layers": len(usable),
        "draws": [one["spearman"] for one in each],
    }
    if len(scores) == 1:
        result["interval"] = bootstrap(scores[0], truth)
    return result


def bootstrap(score: Array, truth: Array, resamples: int = _RESAMPLES) -> dict[str, list[float]]:
    """95% percentile intervals of Pearson and Spearman, filters drawn with replacement.

    They say what another draw of filters from the same network would give, not another network.
    """
    seen = np.isfinite(score) & np.isfinite(truth)
    score, truth = score[seen], truth[seen]
    if len(score) < LEAST:
        return {name: [math.nan, math.nan] for name in ("pearson", "spearman")}
    chosen = np.random.default_rng(0).integers(len(score), size=(resamples, len(score)))
    x, y = score[chosen], truth[chosen]
    rows = {"pearson": (x, y), "spearman": (stats.rankdata(x, axis=1), stats.rankdata(y, axis=1))}
    result = {}
    for name, (a, b) in rows.items():
        found = _pearson_rows(a, b)
        known = found[np.isfinite(found)]
        result[name] = np.percentile(known, (2.5, 97.5)).tolist() if known.size else [math.nan] * 2
    return result


def _pearson_rows(x: Array, y: Array) -> Array:
    """Pearson of each pair of rows; nan where one is constant."""
    x = x - x.mean(1, keepdims=True)
    y = y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    if not found:
        return dict.fromkeys(STATISTICS, math.nan)
    return {name: float(np.mean([one[name] for one in found])) for name in STATISTICS}
