"""`python -m bench`: run all benches, then write the report, its plots and a table of targets.

Results are written bench by bench into part.json, which replaces the last ones when every bench has
run; a run that was stopped goes on with `--resume`. With `-k` the cases that were not run keep
their results, and the report names every commit, day and processor that it holds results of.
`--quick` runs the smallest case of each bench once, into a folder of its own, to see that all
works; other arguments go to pytest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import report
from bench.figures import run_of

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    kind = "quick" if "--quick" in arguments else "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path("bench/results") / kind
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    latest, part = folder / "latest.json", folder / "part.json"
    if "--resume" not in arguments:
        (ROOT / part).unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "bench", f"--results={ROOT / part}", *arguments]
    try:
        code = subprocess.run(command, cwd=ROOT).returncode
    except KeyboardInterrupt:
        code = 130
    if code:
        if (ROOT / part).exists():
            print(f"What was measured is in {part}; the same command with --resume goes on from it")
        return code
    if not (ROOT / part).exists():  # --help and the like measure nothing
        return code
    if "-k" in arguments and (ROOT / latest).exists():
        keep_others(ROOT / latest, ROOT / part)
    (ROOT / part).replace(ROOT / latest)
    report.main([str(latest)])
    return 0


def keep_others(latest: Path, part: Path) -> None:
    """Add to a partial run's results the last ones of all cases that it did not measure, and the
    seconds that benches took then, which tell how long the next whole run will take."""
    old, new = (json.loads(path.read_text()) for path in (latest, part))
    measured = [bench["extra_info"]["case"] for bench in new["benchmarks"]]
    others = [b for b in old["benchmarks"] if b["extra_info"]["case"] not in measured]
    for bench in others:
        bench["extra_info"].setdefault("run", run_of(old))
    new["benchmarks"] = others + new["benchmarks"]
    new["finished"] = old.get("finished", {}) | new.get("finished", {})
    part.write_text(json.dumps(new, indent=4))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
