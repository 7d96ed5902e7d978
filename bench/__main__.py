"""`python -m bench`: run all benches, then write the report and the README's figures.

Results replace the last ones only when every bench has run. `--quick` runs a few rounds, into a
folder of its own, to see that all works; other arguments go to pytest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench import report

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    kind = "quick" if "--quick" in arguments else "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path("bench/results") / kind
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    latest, part = folder / "latest.json", folder / "part.json"
    command = [sys.executable, "-m", "pytest", "bench", f"--benchmark-json={part}", *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        (ROOT / part).unlink(missing_ok=True)
        return code
    (ROOT / part).replace(ROOT / latest)
    readme = ROOT / "README.md"
    figures = kind == "cpu" and readme.exists() and report.BEGIN in readme.read_text()
    report.main([str(latest), *(["--readme", str(readme)] if figures else [])])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
