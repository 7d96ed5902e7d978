"""Channels for people: which layers hang together, and why the others stay."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from taylor_kernels.tracing.answer.units import Group

_ROW, _LEFT, _GAP = 22, 330, 44
_COLOURS = ("#1b7fa6", "#b3541e", "#4b8b3b", "#7a4fa3", "#a3324b", "#7d6b18")
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
svg { display: block } text { font: 12px ui-monospace, monospace; fill: #222 }
.stays { fill: #888 } .size { font-size: 10px } p { max-width: 60em }
.group { opacity: .85 } .group:hover { opacity: 1; stroke-width: 4 }
"""
_LEGEND = (
    "A row is a layer, a line is a group of channels that go together: filled where they come out "
    "of a layer, hollow where they go in, with the number of units at its upper end. Point at a "
    "line for more, as what a unit is. Layers in grey stay, for the reason given."
)


def table(groups: Sequence[Group], words: Sequence[str], skipped: Mapping[str, str]) -> str:
    """The groups and the layers that they run through, then the layers that are left out.

    Args:
        words: what a unit is, for each group.
        skipped: layers that stay -> why.
    """
    lines = []
    for group, unit in zip(groups, words, strict=True):
        per = sum(slot.index.size(1) for slot in group.producers)
        through = ", ".join(f"{slot.owner or 'model'}.{slot.side}" for slot in group.slots)
        lines.append(f"{group.name:<32} {group.size:>6} units of {per:>4} ({unit})  {through}")
    lines += [f"{name or 'model':<32} stays: {why}" for name, why in skipped.items()]
    wrap = textwrap.TextWrapper(
        100, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrap.fill(line) for line in lines)


def write_page(
    path: Path,
    layers: Iterable[str],
    groups: Sequence[Group],
    words: Sequence[str],
    skipped: Mapping[str, str],
) -> Path:
    """Write the picture: a row for each layer, a line for each group.

    Args:
        words: what a unit is, for each group.
        skipped: layers that stay -> why.
    """
    rows = {name: number for number, name in enumerate(layers)}
    columns = _columns(groups, rows)
    right = _LEFT + _GAP * (max(columns, default=0) + 2)
    longest = max((len(why) for why in skipped.values()), default=0)
    width, height = right + 8 * longest, _ROW * (len(rows) + 1)
    lines = _lines(groups, words, rows, columns)
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>Channels</title><style>{_STYLE}</style>"
        f"<h1>Channels that go together</h1><p>{_LEGEND}</p>"
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
        f"{_names(skipped, rows, right)}{''.join(lines)}</svg>",
        encoding="utf-8",
    )
    return path


def _names(skipped: Mapping[str, str], rows: dict[str, int], right: int) -> str:
    parts = []
    for name, row in rows.items():
        why = skipped.get(name)
        kind = "" if why is None else " class='stays'"
        shown = name if len(name) <= 44 else f"…{name[-43:]}"
        parts.append(
            f"<text x='0' y='{_y(row) + 4}'{kind}>{escape(shown or 'model')}</text>"
            f"<line x1='{_LEFT}' x2='{right - 8}' y1='{_y(row)}' y2='{_y(row)}' stroke='#eee'/>"
        )
        if why is not None:
            parts.append(f"<text x='{right}' y='{_y(row) + 4}'{kind}>{escape(why)}</text>")
    return "".join(parts)


def _columns(groups: Sequence[Group], rows: dict[str, int]) -> list[int]:
    """For each group a column in which its line meets no other."""
    ends: list[int] = []
    columns = [0] * len(groups)
    spans = [sorted(rows[slot.owner] for slot in group.slots) for group in groups]
    for number in sorted(range(len(spans)), key=spans.__getitem__):
        first, last = spans[number][0], spans[number][-1]
        column = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[column : column + 1] = [last]
        columns[number] = column
    return columns


def _lines(
    groups: Sequence[Group], words: Sequence[str], rows: dict[str, int], columns: list[int]
) -> list[str]:
    lines = []
    for number, (group, unit, column) in enumerate(zip(groups, words, columns, strict=True)):
        x, colour = _LEFT + _GAP * (column + 1), _COLOURS[number % len(_COLOURS)]
        # Where channels go out and in, as in a depthwise convolution, the filled dot is on top.
        places = sorted((_y(rows[slot.owner]), slot.side) for slot in group.slots)
        ys = [y for y, _ in places]
        norms = f", normalised by {', '.join(group.norms)}" if group.norms else ""
        title = escape(f"{group.name}: {group.size} units, each {unit}{norms}")
        dots = "".join(
            f"<circle cx='{x}' cy='{y}' r='5' stroke='{colour}' "
            f"fill='{colour if side == 'out' else 'white'}'/>"
            for y, side in places
        )
        lines.append(
            f"<g class='group' stroke-width='2'><title>{title}</title>"
            f"<line x1='{x}' x2='{x}' y1='{ys[0]}' y2='{ys[-1]}' stroke='{colour}'/>{dots}</g>"
            f"<text class='size' x='{x + 8}' y='{ys[0] + 4}'>{group.size}</text>"
        )
    return lines


def _y(row: int) -> int:
    return _ROW * row + _ROW // 2
