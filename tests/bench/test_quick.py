"""A quick run of the benches leaves none of them out, and runs far fewer cases."""

from __future__ import annotations

import ast
from collections import Counter

from tests.helpers import ROOT
from tests.helpers.programs import run_pytest


def test_a_quick_run_has_a_case_of_every_bench() -> None:
    done = run_pytest("bench", "--quick", "--collect-only", "-q", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = Counter(
        tuple(line.partition("[")[0].split("::"))
        for line in done.stdout.splitlines()
        if "::bench_" in line
    )
    there = {name for name, _ in cases}  # those whose peers are installed
    defined = {
        (name, node.name)
        for name in there
        for node in ast.parse((ROOT / "bench" / name).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("bench_")
    }
    assert len(there) > 5
    assert defined == set(cases)
    assert max(cases.values()) < 30, "providers of one or two cases"
