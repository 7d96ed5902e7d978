"""Plots of a comparison: plain numbers in, a `Plot` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.oracle import findings
from taylor_kernels.studies.plotting import Plot, Theme, series_style

Row = Mapping[str, Sequence[float]]  # a label -> one figure per seed


@dataclass(frozen=True)
class Scatter:
    """Scores against the oracle of one network: filters as dots.

    Attributes:
        depth: of each filter's layer, 0 for the network's first to 1 for its last.
    """

    title: str
    scores: Sequence[float]
    oracle: Sequence[float]
    depth: Sequence[float]


@dataclass(frozen=True)
class Curves:
    """Pruning curves of one kind: label -> paths, one per seed, of (% of filters removed, %)."""

    title: str
    paths: Mapping[str, Sequence[Sequence[tuple[float, float]]]]


def coefficients(rows: Mapping[str, Mapping[str, Row]]) -> Plot:
    """Bars of the mean with a dot per seed; criteria down, coefficients across.

    Args:
        rows: architecture -> coefficient -> criterion -> values; criteria in the order of the
            first coefficient, the best first.
    """

    def plot(theme: Theme) -> Drawing:
        lengths = [len(next(iter(columns.values()))) for columns in rows.values()]
        columns = len(next(iter(rows.values())))
        drawing = Drawing(figsize=(9.2, 0.8 + 0.27 * sum(lengths)), layout="constrained")
        panels = drawing.subplots(
            len(rows), columns, squeeze=False, sharex=True, height_ratios=lengths
        )
        for line, (architecture, found) in zip(panels, rows.items(), strict=True):
            for number, (panel, (name, bars)) in enumerate(zip(line, found.items(), strict=True)):
                color = theme.series[number % len(theme.series)]
                _bars(panel, bars, color, theme)
                panel.set_title(f"{architecture}: {name}" if number == 0 else name)
                panel.set_yticks(range(len(bars)), list(bars) if number == 0 else [])
        return drawing

    return plot


def _bars(panel: Axes, bars: Row, color: str, theme: Theme) -> None:
    for row, values in enumerate(bars.values()):
        if values:
            mean = float(np.mean(values))
            panel.barh(row, mean, height=0.62, color=theme.page)  # no grid through what follows
            panel.barh(row, mean, height=0.62, color=color, alpha=0.45)
            panel.plot(values, [row] * len(values), ls="", marker="o", ms=3.2, color=color)
    panel.axvline(0, color=theme.soft, lw=0.8)
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.set_xlim(right=1.02)
    panel.set_xticks([0, 0.5, 1.0])
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", length=0)


def scatters(grid: Sequence[Sequence[Scatter]]) -> Plot:
    """Score against oracle on two log axes, a panel per criterion, a row per network."""

    def plot(theme: Theme) -> Drawing:
        across = max(map(len, grid))
        drawing = Drawing(figsize=(9.2, 2.35 * len(grid) + 0.35), layout="constrained")
        panels = drawing.subplots(len(grid), across, squeeze=False)
        colours, scale = _depths(theme), Normalize(0, 1)
        for line, row in zip(panels, grid, strict=True):
            for panel in line[len(row) :]:
                panel.set_axis_off()
            for panel, scatter in zip(line, row, strict=False):
                _scatter(panel, scatter, colours, scale)
            line[0].set_ylabel("oracle, (change of loss)²")
        for panel in panels[-1]:
            panel.set_xlabel("score")
        bar = drawing.colorbar(ScalarMappable(scale, colours), ax=panels, shrink=0.6, aspect=30)
        bar.set_ticks([0, 1], labels=["first", "last"])
        bar.set_label("layer")
        bar.outline.set_visible(False)
        return drawing

    return plot


def _scatter(panel: Axes, scatter: Scatter, colours: Colormap, scale: Normalize) -> None:
    x, y = np.asarray(scatter.scores, dtype=float), np.asarray(scatter.oracle, dtype=float)
    seen = (x > 0) & (y > 0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    depth = np.asarray(scatter.depth)[seen]
    panel.scatter(x[seen], y[seen], s=9, c=depth, cmap=colours, norm=scale, alpha=0.85, lw=0)
    panel.set_title(scatter.title, fontsize=8.5)
    panel.tick_params(labelsize=7)
    panel.minorticks_off()
    for axis, numbers in ((panel.xaxis, x[seen]), (panel.yaxis, y[seen])):
        if numbers.size:
            ticks = _decades(numbers.min(), numbers.max())
            plain = [f"{tick:.2g}" for tick in ticks]
            axis.set_ticks(ticks, labels=plain if ticks[0] == numbers.min() else None)


def _decades(low: float, high: float) -> list[float]:
    """Two or three powers of ten between two numbers; if there are fewer, the ends."""
    first, last = int(np.ceil(np.log10(low))), int(np.floor(np.log10(high)))
    if last <= first:
        return [low, high]
    step = max(-(-(last - first) // 2), min(2, last - first))  # labels of neighbours would touch
    return [10.0**power for power in range(first, last + 1, step)]


def _depths(theme: Theme) -> Colormap:
    return LinearSegmentedColormap.from_list("depth", [theme.series[4], theme.series[0]])


def pruning(rows: Mapping[str, Sequence[Curves]], unit: str) -> Plot:
    """Accuracy, or loss, against filters removed: a row per network, a panel per kind of curve.

    Labels keep their look in all panels; "oracle" is drawn in the colour of the text.
    """

    def plot(theme: Theme) -> Drawing:
        across = max(map(len, rows.values()))
        drawing = Drawing(figsize=(9.2, 3.0 * len(rows) + 0.5), layout="constrained")
        panels = drawing.subplots(len(rows), across, squeeze=False, sharey="row", sharex=True)
        labels = list(dict.fromkeys(n for kinds in rows.values() for k in kinds for n in k.paths))
        styles = _styles(labels, theme)
        for line, (name, kinds) in zip(panels, rows.items(), strict=True):
            for panel in line[len(kinds) :]:
                panel.set_axis_off()
            for panel, kind in zip(line, kinds, strict=False):
                for label, paths in kind.paths.items():
                    _path(panel, label, paths, styles[label])
                panel.set_title(f"{name}: {kind.title}", fontsize=9.5)
            line[0].set_ylabel(unit)
        for panel in panels[-1]:
            panel.set_xlabel("filters removed, %")
        handles: dict[str, Any] = {}
        for panel in panels.flat:
            found, names = panel.get_legend_handles_labels()
            handles |= dict(zip(names, found, strict=True))
        drawing.legend(
            [handles[n] for n in labels if n in handles], [n for n in labels if n in handles],
            loc="outside lower center", ncols=len(labels) if len(labels) <= 6 else 4, fontsize=8.5,
        )  # fmt: skip
        return drawing

    return plot


def _path(
    panel: Axes, label: str, paths: Sequence[Sequence[tuple[float, float]]], style: dict[str, Any]
) -> None:
    points = np.asarray(paths, dtype=float)  # [seeds, points, 2]
    x, y = points[0, :, 0], points[:, :, 1]
    if len(y) > 1:
        panel.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.12, lw=0)
    panel.plot(x, y.mean(0), lw=1.6, ms=3.5, markevery=2, label=label, **style)


def _styles(labels: Sequence[str], theme: Theme) -> dict[str, dict[str, Any]]:
    """A norm that is not scaled is drawn as the one that is, in dots with hollow markers."""
    tail = findings.UNSCALED.format("")
    others = [label for label in labels if label != "oracle" and not label.endswith(tail)]
    styles = {label: series_style(theme, number) for number, label in enumerate(others)}
    for label in labels:
        if label.endswith(tail):
            plain = styles.get(label.removesuffix(tail)) or series_style(theme, len(styles))
            styles[label] = plain | {"ls": (0, (1, 1)), "mfc": theme.page}
    return styles | {"oracle": {"color": theme.ink, "ls": "-", "marker": ""}}
