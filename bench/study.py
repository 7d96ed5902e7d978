"""The correlation study: are the scores right? Runs it, keeps its results, checks its targets.

    python -m bench.study             # runs `taylor-kernels compare` into runs/compare, or goes on
    python -m bench.study --check     # of the kept results: which targets are reached

Results are kept in bench/results/study; tables in the documentation are made of them. Exit code 1
if a target is missed: then a score is wrong, or a network is under-trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.markdown import table
from taylor_kernels.studies.oracle.findings import LATE_NORM_NETWORKS, Target, targets
from taylor_kernels.studies.oracle.settings import OracleSettings
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.results import readable

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path("bench/results/study")
#: Of the criteria that have targets, for both architectures, and of the networks with late norms.
TARGETS = 10 + len(LATE_NORM_NETWORKS)


def without_scores(result: dict) -> dict:
    """The result without every single filter's scores, which are most of it."""
    result = copy.deepcopy(result)
    for network in result["networks"]:
        for criterion in network["criteria"].values():
            criterion.pop("scores", None)
    return result


def missed(result: dict) -> list[Target]:
    """The targets that are not reached.

    Raises:
        ValueError: the study is not whole: criteria or architectures that have targets are absent.
    """
    found = targets(result)
    if len(found) != TARGETS:
        raise ValueError(
            f"result: has figures for {len(found)} of {TARGETS} targets; run the whole study"
        )
    return [target for target in found if not target.reached]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="check what is kept, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where to run")
    options = parser.parse_args(arguments)
    kept = ROOT / KEPT
    if not options.check:
        from taylor_kernels.studies.oracle.run import run

        result, _ = run(OracleSettings(out=options.out), ProgressLog())
        kept.mkdir(parents=True, exist_ok=True)
        for file in options.out.glob("*.png"):
            shutil.copy(file, kept)
        (kept / "result.json").write_text(readable(without_scores(result)))
    result = json.loads((kept / "result.json").read_text())
    print(table(["target", "limit", "measured", ""], [t.row() for t in targets(result)]))
    failed = missed(result)
    for target in failed:
        print(f"MISSED: {target.what}: {target.measured}, not {target.limit}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
