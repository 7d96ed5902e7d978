"""What the documentation quotes of the compression methods' studies, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from bench.markdown import table
from bench.methods import KEPT, ROOT, find_study
from taylor_kernels.studies.methods.pages import SUMMARY_HEAD, summary_row
from taylor_kernels.studies.results import Json


def kept_results() -> dict[str, Json]:
    """Name of each study that has runs -> what is kept of it."""
    found = {file.stem: json.loads(file.read_text()) for file in (ROOT / KEPT).glob("*.json")}
    return {name: found[name] for name in sorted(found) if found[name]["runs"]}


def methods_table() -> str:
    """A row for each method."""
    rows = [summary_row(result) for result in kept_results().values()]
    return table(SUMMARY_HEAD, rows)


def study_block(name: str) -> str:
    """A method's own table, with its caption and source."""
    result = kept_results()[name]
    made = find_study(name).table(result)
    source = f"Source: `{(KEPT / name).as_posix()}.json`, written by `{result['command']}`."
    return "\n\n".join((table(made.columns, made.rows), f"{made.caption} {source}".strip()))


def method_blocks() -> dict[str, Callable[[], str]]:
    """`method-<study>` for each study that has runs."""
    return {f"method-{name}": partial(study_block, name) for name in kept_results()}
