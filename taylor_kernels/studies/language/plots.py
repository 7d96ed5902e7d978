"""Perplexity against what is gone: a column for each kind, as pruned above, trained on below.

Each panel has an axis of its own: kinds differ by orders of magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from taylor_kernels.studies.language.findings import STAGES, chosen
from taylor_kernels.studies.plotting import Plot, Theme, series_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from taylor_kernels.studies.results import Json


def curves(result: Json) -> Plot:
    """The plot of a result."""

    def drawn(theme: Theme) -> Drawing:
        kinds = result["settings"]["kinds"]
        drawing = Drawing(figsize=(2.25 * len(kinds) + 0.6, 5.2), layout="constrained")
        grid = drawing.subplots(len(STAGES), len(kinds), sharex=True, squeeze=False)
        for row, stage in zip(grid, STAGES, strict=True):
            for panel, kind in zip(row, kinds, strict=True):
                _panel(panel, theme, result, kind, stage)
                if stage == next(iter(STAGES)):
                    panel.set_title(kind)
                else:
                    panel.set_xlabel("gone, %")
            row[0].set_ylabel(f"perplexity, {STAGES[stage]}")
        handles, labels = grid[0][0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        return drawing

    return drawn


def _panel(panel: Axes, theme: Theme, result: Json, kind: str, stage: str) -> None:
    settings, level = result["settings"], 2 ** result["dense"][stage]
    fractions = settings["fractions"]
    panel.axhline(level, color=theme.soft, lw=0.9, ls=":")
    for number, criterion in enumerate(settings["criteria"]):
        values = [
            [cell[stage] for cell in chosen(result, kind, fraction, criterion)]
            for fraction in fractions
        ]
        places = [100 * fraction for fraction in fractions]
        style = series_style(theme, number) | {"markersize": 4, "lw": 1.4}
        panel.plot(places, [2 ** (sum(v) / len(v)) for v in values], label=criterion, **style)
        low, high = ([2 ** end(v) for v in values] for end in (min, max))
        panel.fill_between(places, low, high, color=style["color"], alpha=0.15, lw=0)
    panel.set_yscale("log")
    bottom, top = panel.get_ylim()
    wide = top > 10 * bottom
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)) if wide else MaxNLocator(5))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.set_xticks([100 * fraction for fraction in fractions])
