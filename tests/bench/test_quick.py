"""A quick run of the benches leaves none of them out, and runs far fewer cases."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter

from tests.helpers import ROOT


def test_a_quick_run_has_a_case_of_every_bench() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "--device", "cpu", "-p", "no:cacheprovider"],
        cwd=ROOT,
        # A worker of xdist says in it that nothing is to be measured.
        env={name: value for name, value in os.environ.items() if "XDIST" not in name},
        capture_output=True,
        text=True,
    )
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
