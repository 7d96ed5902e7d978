"""Figures and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.figures import Entry

#: The heads of what `timing` gives, behind the provider's.
TIMING = ("median ms", "min ms", "IQR ms")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(seconds: float) -> str:
    """Three significant digits at least, in milliseconds."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def timing(entry: Entry) -> list[str]:
    """The provider, and its median, least time and interquartile range in milliseconds."""
    return [entry.label, *(ms(entry.stats[key]) for key in ("median", "min", "iqr"))]


def host_ms(entry: Entry) -> str:
    """What the host took to queue a call on a GPU; in brackets if it was not ahead of the GPU."""
    if entry.info.get("host_s") is None:
        return "–"
    spent = ms(entry.info["host_s"])
    return spent if entry.info["ahead"] > 0.5 else f"({spent})"
