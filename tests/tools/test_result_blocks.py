"""The documentation quotes the results that are kept, to the last digit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the study needs SciPy")
pytest.importorskip("matplotlib", reason="the study needs matplotlib")

from bench.figures import load
from tests.helpers import ROOT
from tools import result_blocks

PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def bench() -> str:
    results = load(ROOT / "bench/results/cpu/latest.json")
    results.path = Path("bench/results/cpu/latest.json")  # as it is quoted
    return result_blocks.bench_block(results)


def kept(path: Path) -> dict:
    return json.loads((ROOT / path).read_text())


BLOCKS = {
    "bench": bench,
    "demo": lambda: result_blocks.demo_block(kept(result_blocks.DEMO)),
    "study": lambda: result_blocks.study_block(kept(result_blocks.STUDY / "result.json")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_page_holds_the_figures_that_are_kept(name):
    marked = re.compile(f"<!-- {name}:begin -->\n(.*?)\n<!-- {name}:end -->", re.DOTALL)
    quoted = [text for page in PAGES for text in marked.findall(page.read_text())]
    assert quoted
    assert all(text == BLOCKS[name]() for text in quoted)
