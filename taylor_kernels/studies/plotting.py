"""How every plot is drawn: once for light pages and once for dark ones, and as a PNG file.

A plot is described by a function of a `Theme`, so that one description is drawn once per theme.
Colours are those of Okabe and Ito, told apart by colour-blind readers too; marker and line style
repeat what the colour says.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.report import Figure

Plot = Callable[["Theme"], Drawing]


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: `page` behind it, `ink` for text, `soft` and `line` for what is beside."""

    page: str
    ink: str
    soft: str
    line: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1c2126", "#5b6570", "#dde2e7",
    ("#0072b2", "#d55e00", "#009e73", "#a8508a", "#b07d00"),
)  # fmt: skip
DARK = Theme(
    "#14181c", "#e6e9ec", "#a2acb6", "#39424b",
    ("#56b4e9", "#f08a4b", "#35c79b", "#e29bc4", "#f0c04f"),
)  # fmt: skip
_MARKERS, _LINES = "osD^v", ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1, 1.5)), "--")


def draw(plot: Plot, png: Path, *, alt: str, caption: str) -> Figure:
    """Write the plot to `png` in light colours and give it as a block of a report."""
    svgs = []
    for theme in (LIGHT, DARK):
        style: Any = _style(theme)  # matplotlib 3.11 types the keys, older ones do not
        with matplotlib.rc_context(style):
            drawing = plot(theme)
            buffer = io.BytesIO()
            drawing.savefig(buffer, format="svg", metadata={"Date": None})
            svgs.append(buffer.getvalue())
            if theme is LIGHT:
                drawing.savefig(png, dpi=144)
    return Figure(svgs[0], svgs[1], alt=alt, caption=caption, file=png.name)


def series_style(theme: Theme, number: int) -> dict[str, Any]:
    """Colour, marker and line style of the series of that number, the same in every plot."""
    again = number // len(theme.series)  # the colours are used up: other lines and markers
    return {
        "color": theme.series[number % len(theme.series)],
        "marker": _MARKERS[(number + again) % len(_MARKERS)],
        "ls": _LINES[(number + again) % len(_LINES)],
    }


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "svg.hashsalt": "taylor-kernels",  # the same ids, so the same file, on every run
        "svg.fonttype": "path",
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.page),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), theme.ink),
        **dict.fromkeys(("xtick.color", "ytick.color"), theme.soft),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), theme.ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), theme.line),
    }
