"""Plots of a pruning run: plain numbers in, a `Plot` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from taylor_kernels.studies.plotting import Plot, Theme, series_style

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """What one criterion did: a path per seed of (FLOPs kept, accuracy), and where each ended.

    All in percent; `final` holds one accuracy per seed, after fine-tuning.
    """

    label: str
    paths: Sequence[Sequence[Point]]
    final: Sequence[float]


def accuracy_against_flops(series: Sequence[Series], dense: Sequence[float]) -> Plot:
    """Left: accuracy while pruning goes on. Right, on its own scale: each seed after fine-tuning.

    Args:
        dense: accuracy in percent of the dense network, one per seed.
    """

    def plot(theme: Theme) -> Drawing:
        drawing = Drawing(figsize=(9.2, 4.3), layout="constrained")
        left, right = drawing.subplots(1, 2, width_ratios=(2.3, 1))
        left.axhline(float(np.mean(dense)), color=theme.soft, lw=1, ls=":", label="dense")
        for number, one in enumerate(series):
            style = series_style(theme, number)
            for path in one.paths if len(one.paths) > 1 else ():
                left.plot(*zip(*path, strict=True), color=style["color"], lw=0.8, alpha=0.4)
            x, y = _mean_path(one.paths)
            left.plot(x, y, lw=2, markevery=0.13, ms=5, label=one.label, **style)
        left.invert_xaxis()
        left.set(xlabel="FLOPs kept, % of the dense network", ylabel="test accuracy, %")
        left.set_title("While pruning, right after each step")
        left.legend(loc="lower left")

        _finals(right, series, dense, theme)
        return drawing

    return plot


def _finals(panel: Axes, series: Sequence[Series], dense: Sequence[float], theme: Theme) -> None:
    """A column of marks per network. What is far below is named at the edge, not to flatten all."""
    columns: list[tuple[str, Sequence[float], str, str]] = [("dense", dense, theme.soft, "o")]
    for number, one in enumerate(series):
        style = series_style(theme, number)
        columns.append((one.label, one.final, style["color"], style["marker"]))
    floor = max(min(min(values) for _, values, *_ in columns), min(dense) - 3)
    top = max(max(values) for _, values, *_ in columns)
    margin = 0.1 * (top - floor) + 0.1
    for x, (_, values, color, marker) in enumerate(columns):
        mean = float(np.mean(values))
        if mean < floor:
            panel.annotate(
                f"{mean:.1f}", (x, floor - margin), (x, floor + 2 * margin), color=color,
                ha="center", arrowprops={"arrowstyle": "->", "color": color},
            )  # fmt: skip
            continue
        shifts = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        panel.plot(x + shifts, values, ls="", ms=6, alpha=0.85, color=color, marker=marker)
        panel.hlines(mean, x - 0.3, x + 0.3, color=color, lw=1.6)
    panel.set_ylim(floor - margin, top + margin)
    panel.set_xlim(-0.6, len(columns) - 0.4)
    panel.set_xticks(range(len(columns)), [name for name, *_ in columns], rotation=35, ha="right")
    panel.set_title("After fine-tuning (own scale)")


def widths(before: Mapping[str, int], after: Mapping[str, Mapping[str, int]]) -> Plot:
    """Filters per layer: what was there as an outline, what each criterion kept as a bar.

    Args:
        after: criterion -> layer -> filters.
    """

    def plot(theme: Theme) -> Drawing:
        layers = list(before)
        y = np.arange(len(layers))
        drawing = Drawing(figsize=(9.2, 1.1 + 0.27 * len(layers)), layout="constrained")
        panels = np.atleast_1d(drawing.subplots(1, len(after), sharex=True, sharey=True))
        for number, (panel, (label, kept)) in enumerate(zip(panels, after.items(), strict=True)):
            color = theme.series[number % len(theme.series)]
            full, left = [before[name] for name in layers], [kept[name] for name in layers]
            panel.barh(y, full, height=0.74, color="none", edgecolor=theme.soft, lw=0.8)
            panel.barh(y, left, height=0.74, color=color, alpha=0.85)
            for row, (total, rest) in enumerate(zip(full, left, strict=True)):
                x = total + max(full) * 0.02
                panel.text(x, row, str(rest), va="center", fontsize=8, color=theme.ink)
            panel.set_title(label)
            panel.set_xlim(0, max(full) * 1.14)
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
            panel.set_xlabel("filters (outline: dense)")
        panels[0].set_yticks(y, layers)
        panels[0].set_ylim(len(layers) - 0.4, -0.6)
        return drawing

    return plot


def importance(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    kept: Mapping[str, Mapping[str, Sequence[bool]]] | None = None,
) -> Plot:
    """The scores of each layer's filters on a log axis, a dot per filter, a tick at the median.

    Args:
        scores: criterion -> layer -> one score per filter; scores of 0 are left out of the axis.
        kept: the same shape; filters that were removed are drawn hollow.
    """

    def plot(theme: Theme) -> Drawing:
        layers = list(next(iter(scores.values())))
        drawing = Drawing(figsize=(9.2, 1.3 + 0.3 * len(layers)), layout="constrained")
        panels = np.atleast_1d(drawing.subplots(1, len(scores), sharey=True))
        for number, (panel, (label, table)) in enumerate(zip(panels, scores.items(), strict=True)):
            color = theme.series[number % len(theme.series)]
            for row, layer in enumerate(layers):
                values = np.asarray(table[layer], dtype=float)
                alive = np.ones(len(values), bool)
                if kept is not None and label in kept:
                    alive = np.asarray(kept[label][layer], dtype=bool)
                _dots(panel, row, values, alive, color, theme)
            _log_axis(panel, [value for layer in layers for value in table[layer]])
            panel.set_title(label)
            panel.set_xlabel("score of a filter, log scale")
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(layers)), layers)
        panels[0].set_ylim(len(layers) - 0.4, -0.6)
        return drawing

    return plot


def _log_axis(panel: Axes, values: Sequence[float]) -> None:
    """A log x axis whose labels do not collide: 1, 2, 5 over two decades at most, else decades."""
    panel.set_xscale("log")
    seen = [value for value in values if value > 0]
    if not seen:
        return
    decades = np.log10(max(seen) / min(seen))
    if decades < 2:
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _dots(
    panel: Axes, row: int, values: np.ndarray, alive: np.ndarray, color: str, theme: Theme
) -> None:
    # The golden ratio spreads any number of dots evenly, and the same way on every run.
    heights = row + 0.5 * ((np.arange(len(values)) * 0.618034) % 1 - 0.5)
    seen = values > 0
    for which, face in ((alive & seen, color), (~alive & seen, "none")):
        panel.scatter(values[which], heights[which], s=15, fc=face, ec=color, lw=0.8, alpha=0.75)
    if seen.any():
        panel.vlines(np.median(values), row - 0.4, row + 0.4, color=theme.ink, lw=1.4)


def _mean_path(paths: Sequence[Sequence[Point]]) -> tuple[np.ndarray, np.ndarray]:
    """The paths' mean, over the FLOPs that all of them passed."""
    ordered = [np.asarray(sorted(path), dtype=float) for path in paths]
    low = max(path[0, 0] for path in ordered)
    high = min(path[-1, 0] for path in ordered)
    x = np.unique(np.concatenate([path[:, 0] for path in ordered]).clip(low, high))
    y = np.mean([np.interp(x, path[:, 0], path[:, 1]) for path in ordered], axis=0)
    return x[::-1], y[::-1]
