"""Puts the table of `taylor-kernels demo` into the README, from the demo's own result.json.

taylor-kernels demo
python -m bench.demo runs/demo/result.json     # kept as bench/results/demo/result.json
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from bench.markdown import table
from bench.report import rewrite
from taylor_kernels.studies.pruning.pages import result_table

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path("bench/results/demo/result.json")


def readme_block(result: dict) -> str:
    """The demo's table in Markdown, with its caption and source."""
    made = result_table(result)
    source = f"Source: `{KEPT.as_posix()}`, written by `make demo`."
    return "\n\n".join((table(made.columns, made.rows), f"{made.caption} {source}"))


def main(path: str) -> None:
    kept = ROOT / KEPT
    kept.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).resolve() != kept:
        shutil.copy(path, kept)
    block = readme_block(json.loads(kept.read_text()))
    rewrite(ROOT / "README.md", block, "<!-- demo:begin -->", "<!-- demo:end -->")


if __name__ == "__main__":
    main(*sys.argv[1:])
