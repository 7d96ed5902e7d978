"""`python -m bench`: run all benches, then write the report, its plots and a table of targets.

Results replace the last ones only when every bench has run. With `-k` the cases that were not run
keep theirs, and the report names every commit and day that it holds results of. `--quick` runs a
few rounds, into a folder of its own, to see that all works; other arguments go to pytest.
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
    command = [sys.executable, "-m", "pytest", "bench", f"--benchmark-json={part}", *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code or not (ROOT / part).stat().st_size:  # --help and the like measure nothing
        (ROOT / part).unlink(missing_ok=True)
        return code
    if "-k" in arguments and (ROOT / latest).exists():
        keep_others(ROOT / latest, ROOT / part)
    (ROOT / part).replace(ROOT / latest)
    report.main([str(latest)])
    return 0


def keep_others(latest: Path, part: Path) -> None:
    """Add to a partial run's results the last ones of all cases that it did not measure."""
    old, new = (json.loads(path.read_text()) for path in (latest, part))
    measured = [bench["extra_info"]["case"] for bench in new["benchmarks"]]
    others = [b for b in old["benchmarks"] if b["extra_info"]["case"] not in measured]
    for bench in others:
        bench["extra_info"].setdefault("run", run_of(old))
    new["benchmarks"] = others + new["benchmarks"]
    part.write_text(json.dumps(new, indent=4))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
