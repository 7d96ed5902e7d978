"""A page that shows which layers hang together, and why the others stay."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taylor_kernels.tracing.channels import Channels

_ROW, _LEFT, _GAP = 22, 330, 26
_COLOURS = ("#1b7fa6", "#b3541e", "#4b8b3b", "#7a4fa3", "#a3324b", "#7d6b18")
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222 }
svg { display: block } text { font: 12px ui-monospace, monospace }
.stays { fill: #999 } td { padding: 2px 12px 2px 0; vertical-align: top }
.group { opacity: .85 } .group:hover { opacity: 1; stroke-width: 4 }
"""


def write_page(channels: Channels, path: Path) -> Path:
    """Write the picture: a row for each layer, a column for each group."""
    rows = {name: number for number, name in enumerate(channels.layers)}
    width = _LEFT + _GAP * (len(channels.groups) + 1)
    height = _ROW * (len(rows) + 1)
    parts = [_names(channels, rows), *_columns(channels, rows)]
    reasons = "".join(
        f"<tr><td>{escape(name or 'model')}</td><td>{escape(why)}</td></tr>"
        for name, why in channels.skipped.items()
    )
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>Channels</title><style>{_STYLE}</style>"
        "<h1>Channels that go together</h1>"
        "<p>A line is a group: filled where its channels come out of a layer, hollow where they go "
        "in. Point at it for its size.</p>"
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
        f"{''.join(parts)}</svg><h2>Layers that stay</h2><table>{reasons}</table>",
        encoding="utf-8",
    )
    return path


def _names(channels: Channels, rows: dict[str, int]) -> str:
    return "".join(
        f"<text x='0' y='{_y(row) + 4}'{' class=stays' if name in channels.skipped else ''}>"
        f"{escape((name or 'model')[-44:])}</text>"
        f"<line x1='{_LEFT}' x2='100%' y1='{_y(row)}' y2='{_y(row)}' stroke='#eee'/>"
        for name, row in rows.items()
    )


def _columns(channels: Channels, rows: dict[str, int]) -> list[str]:
    columns = []
    for number, group in enumerate(channels.groups):
        x, colour = _LEFT + _GAP * (number + 1), _COLOURS[number % len(_COLOURS)]
        places = [(_y(rows[slot.owner]), slot.side) for slot in group.slots]
        ys = [y for y, _ in places]
        norms = f", behind them {', '.join(group.norms)}" if group.norms else ""
        title = escape(f"{group.name}: {group.size} units{norms}")
        dots = "".join(
            f"<circle cx='{x}' cy='{y}' r='5' stroke='{colour}' "
            f"fill='{colour if side == 'out' else 'white'}'/>"
            for y, side in sorted(places)
        )
        columns.append(
            f"<g class='group' stroke-width='2'><title>{title}</title>"
            f"<line x1='{x}' x2='{x}' y1='{min(ys)}' y2='{max(ys)}' stroke='{colour}'/>{dots}</g>"
        )
    return columns


def _y(row: int) -> int:
    return _ROW * (row + 1)
