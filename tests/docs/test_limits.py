"""The bounds that docs/limits.md tells of are those of the code."""

from __future__ import annotations

import inspect

from taylor_kernels.pruning.proof import check, second_choice
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.notes import record
from taylor_kernels.tracing.run import running
from tests.helpers import ROOT


def test_bounds_are_those_of_the_code():
    lines = (ROOT / "docs/limits.md").read_text().splitlines()
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    seconds = inspect.signature(trace).parameters["seconds"].default
    size = f"2^{record.MOST.bit_length() - 1} ({record.MOST >> 27} GiB)"
    choices = f"{second_choice._MOST} choices, none begun after {second_choice._SECONDS:g} s"
    told = {
        "| a trace": f"{seconds:g} s",
        "| numbers that a trace notes": size,
        "| the proof of a pruner": f"{check.SECONDS:g} s",
        "| other axes for groups that the proof refuses": choices,
        "| waiting for other threads": f"{running.WAIT:g} s",
    }
    for row, bound in told.items():
        assert rows[row].split(" | ")[1] == bound


def test_names_in_it_are_those_of_the_code():
    """What it says to set is what is read."""
    text = (ROOT / "docs/limits.md").read_text()
    for module, name in ((record, "MOST"), (check, "SECONDS")):
        assert f"`{module.__name__}.{name} = " in text
