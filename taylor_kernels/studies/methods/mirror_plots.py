"""The plot of the mirror-descent study: accuracies, and what becomes of weights at a level."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of
from taylor_kernels.studies.plotting import Plot, Theme, series_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from taylor_kernels.studies.results import Json

#: The plain form and the stable one, as the study names them.
PLAIN, STABLE = "md-tanh (plain)", "md-tanh-s"


def plot(result: Json) -> Plot:
    """Of every way a point for each seed; and by epochs the share of weights that are at a level
    exactly in float32, and of those how many take the other sign in the next epoch."""

    def drawn(theme: Theme) -> Drawing:
        problems = problems_of(result)
        drawing = Drawing(figsize=(10.5, 3.4 * len(problems)), layout="constrained")
        axes = drawing.subplots(len(problems), 3, squeeze=False, width_ratios=(1.5, 1, 1))
        for row, problem in zip(axes, problems, strict=True):
            _accuracies(row[0], theme, result, problem)
            _by_epoch(row[1], theme, result, problem, "saturated", "weights at a level exactly, %")
            _by_epoch(row[2], theme, result, problem, "turned", "of those, turned in an epoch, %")
        lines = {line.get_label(): line for ax in axes[:, 1] for line in ax.get_lines()}
        if lines:
            handles, labels = list(lines.values()), list(map(str, lines))
            drawing.legend(handles, labels, loc="outside lower right", ncols=2)
        return drawing

    return drawn


def _accuracies(ax: Axes, theme: Theme, result: Json, problem: tuple[str, str]) -> None:
    ways = [way for way in ways_of(result) if runs_of(result, way, problem)]
    for number, way in enumerate(ways[::-1]):
        values = [100 * run["accuracy"] for run in runs_of(result, way, problem)]
        ax.plot(values, [number] * len(values), "o", color=theme.series[0], alpha=0.6)
        ax.plot([mean(values)] * 2, [number - 0.3, number + 0.3], color=theme.series[1], lw=2)
    ax.set(
        title=", ".join(problem),
        xlabel="accuracy of rounded weights, % (bar: mean)",
        yticks=range(len(ways)),
    )
    ax.set_yticklabels(ways[::-1])


def _by_epoch(
    ax: Axes, theme: Theme, result: Json, problem: tuple[str, str], key: str, label: str
) -> None:
    for number, way in enumerate((PLAIN, STABLE)):
        runs = [run for run in runs_of(result, way, problem) if key in run]
        if runs:
            each = [100 * mean(values) for values in zip(*(run[key] for run in runs), strict=True)]
            style = series_style(theme, number) | {"marker": ""}
            ax.plot(range(1, len(each) + 1), each, label=way, **style)
    ax.set(xlabel="epoch", ylabel=label)
    ax.set_ylim(bottom=0)
    if not ax.get_lines():
        ax.set_axis_off()
