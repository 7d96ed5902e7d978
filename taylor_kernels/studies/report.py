"""Reports: sections of text, tables and figures, rendered to one HTML file that needs nothing else.

A job builds a `Report` and calls `render`; what a table says on the page it says on the terminal
too (`print_table`). The page has no script and no reference to anything outside itself, and
follows the reader's light or dark setting, the figures included.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Text:
    """Paragraphs separated by blank lines; `code` in backticks and **bold** are rendered."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are to be read, units included in the column's name.

    Attributes:
        numeric: numbers of the columns that are set flush right; default all but the first.
        emphasis: numbers of the rows that are set in bold.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[int] | None = None
    emphasis: Sequence[int] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows: {list(row)} has {len(row)} cells for {len(self.columns)} columns"
                )

    def right_aligned(self, column: int) -> bool:
        return column > 0 if self.numeric is None else column in self.numeric


@dataclass(frozen=True)
class Figure:
    """A drawing in two SVG versions, for light and dark pages.

    Attributes:
        alt: what the figure shows, for those who cannot see it.
        file: the name of the PNG beside the report, mentioned under the figure.
    """

    light: bytes
    dark: bytes
    alt: str
    caption: str = ""
    file: str = ""


Block = Text | Table | Figure


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A title, a lead that says the result in a sentence or two, and sections.

    Attributes:
        footer: how the report was made: command, versions, date.
    """

    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""


def render(report: Report) -> str:
    """The report as one HTML document."""
    body = [
        f"<header><h1>{_escape(report.title)}</h1>",
        f'<div class="lead">{_paragraphs(report.lead)}</div></header>',
    ]
    for section in report.sections:
        blocks = "\n".join(_block(block) for block in section.blocks)
        body.append(f"<section><h2>{_escape(section.title)}</h2>\n{blocks}\n</section>")
    if report.footer:
        body.append(f"<footer>{_paragraphs(report.footer)}</footer>")
    return _PAGE.format(title=_escape(report.title), style=_STYLE, body="\n".join(body))


def print_table(table: Table, console: Console) -> None:
    """The table on a terminal, or as plain aligned text where output is not one."""
    shown = RichTable(
        caption=table.caption or None,
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for number, name in enumerate(table.columns):
        right = table.right_aligned(number)
        justify: JustifyMethod = "right" if right else "left"
        shown.add_column(name, justify=justify, overflow="fold", no_wrap=number == 0)
    for number, row in enumerate(table.rows):
        cells = [cell.replace("[", r"\[") for cell in row]
        shown.add_row(*cells, style="bold" if number in table.emphasis else None)
    console.print(shown)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _paragraphs(block.text)
    return _table(block) if isinstance(block, Table) else _figure(block)


def _table(table: Table) -> str:
    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        align = ' class="n"' if table.right_aligned(column) else ""
        return f"<{tag}{scope}{align}>{_inline(text)}</{tag}>"

    head = "".join(cell("th", c, i, ' scope="col"') for i, c in enumerate(table.columns))
    rows = []
    for number, row in enumerate(table.rows):
        first = cell("th", row[0], 0, ' scope="row"')
        rest = "".join(cell("td", text, i) for i, text in enumerate(row[1:], start=1))
        strong = ' class="strong"' if number in table.emphasis else ""
        rows.append(f"<tr{strong}>{first}{rest}</tr>")
    caption = f"<figcaption>{_inline(table.caption)}</figcaption>" if table.caption else ""
    return (
        f'<figure><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{caption}</figure>"
    )


def _figure(figure: Figure) -> str:
    note = f" <code>{_escape(figure.file)}</code>" if figure.file else ""
    caption = f"<figcaption>{_inline(figure.caption)}{note}</figcaption>"
    return (
        '<figure><picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{_data_uri(figure.dark)}"><img alt="{_escape(figure.alt)}" '
        f'src="{_data_uri(figure.light)}"></picture>{caption}</figure>'
    )


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _paragraphs(text: str) -> str:
    parts = re.split(r"\n\s*\n", text.strip())
    return "\n".join(f"<p>{_inline(part)}</p>" for part in parts if part)


def _inline(text: str) -> str:
    escaped = _escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2126; --soft: #5b6570;
  --line: #dde2e7; --band: #f4f6f8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e6e9ec; --soft: #a2acb6; --line: #313941; --band: #1d2329; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.lead { font-size: 1.12rem; }
figure { margin: 1.2rem 0; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 46rem; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 26rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { font-size: .85rem; color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
td.n { white-space: nowrap; }
th.n, td.n { text-align: right; }
tr.strong > * { font-weight: 650; background: var(--band); }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  background: var(--band); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
footer { margin-top: 2.6rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .88rem; }
@media print { main { max-width: none; } figure { break-inside: avoid; } }
"""
