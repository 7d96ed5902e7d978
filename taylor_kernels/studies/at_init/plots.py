"""Accuracy, or loss, against sparsity: all methods in one panel, then each with its controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.at_init.findings import PLAIN, chosen, methods, percent, sparsities
from taylor_kernels.studies.at_init.measure import CONTROLS
from taylor_kernels.studies.plotting import Plot, Theme, series_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from taylor_kernels.studies.results import Json


def curves(networks: Sequence[tuple[str, Sequence[Json], Sequence[Json]]]) -> Plot:
    """A row of panels for each network.

    Args:
        networks: name, points, and the figures of the dense network, one of each seed.
    """

    def drawn(theme: Theme) -> Drawing:
        columns = 1 + max(len(methods(points)) for _, points, _ in networks)
        across = min(columns, 4)
        down = math.ceil(columns / across)
        drawing = Drawing(figsize=(2.9 * across, 2.7 * down * len(networks)), layout="constrained")
        grid = drawing.subplots(down * len(networks), across, squeeze=False)
        for number, (name, points, dense) in enumerate(networks):
            panels = list(grid[number * down : (number + 1) * down].flat)
            _panels(panels, theme, name, points, dense)
        _legend(drawing, drawing.axes[0], "first panel of a network", "left")
        if columns > 1:
            _legend(drawing, drawing.axes[1], "the others", "right")
        return drawing

    return drawn


def _panels(
    panels: list[Axes], theme: Theme, name: str, points: Sequence[Json], dense: Sequence[Json]
) -> None:
    first, *others = panels
    for number, method in enumerate(methods(points)):
        _line(first, theme, number, points, method, PLAIN, method)
    _frame(first, theme, name, points, dense)
    for ax, method in zip(others, methods(points), strict=False):
        for number, control in enumerate(CONTROLS):
            _line(ax, theme, number, points, method, control, control)
        _frame(ax, theme, method, points, dense)
        ax.sharey(first)
    for ax in others[len(methods(points)) :]:
        ax.set_axis_off()


def _legend(drawing: Drawing, ax: Axes, title: str, side: str) -> None:
    """Below all panels, so that it covers no line."""
    style: Any = {"loc": f"outside lower {side}", "fontsize": 7, "title_fontsize": 7.5}
    drawing.legend(*ax.get_legend_handles_labels(), title=title, ncols=3, **style)


def _line(
    ax: Axes,
    theme: Theme,
    number: int,
    points: Sequence[Json],
    method: str,
    control: str,
    label: str,
) -> None:
    every = {s: chosen(points, method, control, s) for s in sparsities(points)}
    values = {s: [_value(point) for point in found] for s, found in every.items() if found}
    if not values:
        return
    style = series_style(theme, number) | {"markersize": 3.5, "lw": 1.3}
    places = [_place(s) for s in values]
    ax.plot(places, [sum(v) / len(v) for v in values.values()], label=label, **style)
    low, high = ([end(v) for v in values.values()] for end in (min, max))
    ax.fill_between(places, low, high, color=style["color"], alpha=0.15, lw=0)


def _frame(
    ax: Axes, theme: Theme, title: str, points: Sequence[Json], dense: Sequence[Json]
) -> None:
    level = sum(map(_value, dense)) / len(dense)
    ax.axhline(level, color=theme.soft, lw=0.9, ls=":")
    every = sparsities(points)
    ax.set_title(title)
    ax.set_xticks([_place(s) for s in every], [percent(s) for s in every], fontsize=7, rotation=45)
    ax.set_ylabel("accuracy, %" if "accuracy" in dense[0] else "loss")


def _place(sparsity: float) -> float:
    """Even steps where what is left is halved."""
    return -math.log2(1 - sparsity)


def _value(found: Json) -> float:
    return 100 * found["accuracy"] if "accuracy" in found else found["loss"]
