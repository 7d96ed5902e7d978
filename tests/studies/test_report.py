"""The report: one HTML page that needs nothing else, and plots in two themes."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from taylor_kernels.studies.report import Figure, Report, Section, Table, Text, print_table, render

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from taylor_kernels.studies import plotting
from taylor_kernels.studies.pruning import plots

TABLE = Table(("name", "size, MB"), [["a<b", "1.5"], ["[bold]", "20.0"]], caption="Sizes.")


class _Links(HTMLParser):
    """Every attribute that makes a browser fetch something, and tags left open."""

    FETCHES = ("src", "href", "srcset", "data", "action", "poster", "background")
    VOID = ("meta", "source", "img", "br", "link", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in self.FETCHES]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> _Links:
    parser = _Links()
    parser.feed(page)
    parser.close()
    return parser


def a_figure(tmp_path, plot=None, name="plot.png"):
    series = [plots.Series("one", [[(100, 99), (50, 90)]], [98])]
    plot = plot or plots.accuracy_against_flops(series, [99])
    return plotting.draw(plot, tmp_path / name, alt="a & b", caption="What is seen.")


def test_page_is_self_contained_and_well_formed(tmp_path):
    report = Report(
        "Title <x>", "Lead.", [Section("One", [Text("A\n\nB"), TABLE, a_figure(tmp_path)])], "`cmd`"
    )
    page = render(report)
    parsed = parse(page)
    assert not parsed.open
    assert len(parsed.links) == 2  # one picture: light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in parsed.links)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_what_users_wrote_is_escaped():
    page = render(Report("<script>", "a < b & `x<y` **bold**", [Section("s", [TABLE])]))
    assert "<script>" not in page
    assert "a &lt; b &amp; <code>x&lt;y</code> <strong>bold</strong>" in page
    assert "a&lt;b" in page


def test_paragraphs_are_kept_apart():
    assert render(Report("t", "one\n\ntwo")).count("<p>") == 2


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"2 columns"):
        Table(("a", "b"), [["only one"]])


def test_table_on_a_terminal_says_the_same(capsys):
    buffer = io.StringIO()
    print_table(TABLE, Console(file=buffer, width=60))
    lines = buffer.getvalue().splitlines()
    assert any("a<b" in line and "1.5" in line for line in lines)
    assert any("[bold]" in line and "20.0" in line for line in lines)
    assert "Sizes." in buffer.getvalue()
    assert "\x1b" not in buffer.getvalue()


def test_plot_is_written_in_both_themes_and_the_same_every_time(tmp_path):
    first, second = a_figure(tmp_path), a_figure(tmp_path, name="again.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (first.light, first.dark) == (second.light, second.dark)
    assert first.light != first.dark
    assert plotting.DARK.page.encode() in first.dark
    for svg in (first.light, first.dark):
        assert not re.search(rb'(xlink:href|href|src)="(?!#)', svg)


@pytest.mark.parametrize("seeds", [1, 3])
def test_accuracy_plot_takes_paths_that_step_at_different_places(tmp_path, seeds):
    paths = [[(100, 99.0), (80 - seed, 97.0), (50 - seed / 10, 90.0)] for seed in range(seeds)]
    series = [plots.Series(name, paths, [98.0] * seeds) for name in ("a", "b")]
    series.append(plots.Series("far below", paths, [20.0] * seeds))
    figure = a_figure(tmp_path, plots.accuracy_against_flops(series, [99.0] * seeds))
    assert len(figure.light) > 5000


def test_mean_path_is_the_mean_where_all_paths_were():
    x, y = plots._mean_path([[(100, 100), (50, 50)], [(100, 100), (60, 80)]])
    assert x.tolist() == [100, 60]
    assert y.tolist() == [100, 70]


def test_importance_plot_takes_zeros_and_layers_without_a_positive_score(tmp_path):
    scores = {
        "a": {"one": [0.0, 1e-9, 1e-3], "two": [0.0, 0.0]},
        "b": {"one": [1, 2, 3], "two": [0, 0]},
    }
    kept = {"a": {"one": [True, False, True], "two": [False, True]}}
    a_figure(tmp_path, plots.importance(scores, kept))


def test_widths_plot_takes_one_criterion(tmp_path):
    a_figure(tmp_path, plots.widths({"conv": 16, "deep": 64}, {"a": {"conv": 1, "deep": 64}}))


def test_figure_is_embedded_as_it_is():
    figure = Figure(b"<svg>1</svg>", b"<svg>2</svg>", alt='say "hi"', caption="c", file="f.png")
    page = render(Report("t", "", [Section("s", [figure])]))
    light, dark = (base64.b64encode(svg).decode() for svg in (figure.light, figure.dark))
    assert light in page
    assert page.index(dark) < page.index(light)  # <source> comes before the <img> it stands for
    assert "say &quot;hi&quot;" in page
