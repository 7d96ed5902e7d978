"""What `make gpu-check` runs on a machine with an NVIDIA GPU: build, test, sanitize, bench.

    python3 bench/gpu_check.py        # results in $OUT, or bench/results/gpu-check

Needs no network: the system's Python with torch, pybind11, cmake, ninja, pytest and
pytest-benchmark, and the CUDA toolkit. Steps have a time limit each, and a failure does not stop
the next; the exit code is 1 if any failed, 2 without a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: step -> its cases, and the seconds after which no further one begins. Those of `bench` fit the
#: time with torch.compile's cold start; `python -m bench` runs all.
BENCHES = {
    "bench": (
        "(resnet50 or llama-bf16 or nchw or channels_last or scoring_step) and not fisher",
        120,
    ),
    "fisher step": ("fisher_step", 50),
    "fisher layers": ("conv2d_fisher", 70),
}
#: Seconds for all steps; what the first leave is what the last have.
TOTAL = 560


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: int


def steps(out: Path) -> list[Step]:
    python = sys.executable
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    sanitizer = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9"]
    script = [python, str(ROOT / "bench" / "sanitize.py")]

    def bench(name: str) -> Step:
        cases, seconds = BENCHES[name]
        command = [*tests, "bench", "--quick", "-k", cases, f"--seconds={seconds}"]
        return Step(name, [*command, f"--benchmark-json={measured(out, name)}"], seconds + 30)

    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 100),
        Step("tests", [*tests, "-m", "gpu", "tests/gpu"], 130),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", *script], 40),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *script], 50),
        *map(bench, BENCHES),
    ]


def measured(out: Path, name: str) -> Path:
    """Where a step of benches leaves its results."""
    return out / f"{name.replace(' ', '-')}.json"


def gather(out: Path) -> dict[str, object] | None:
    """The results of all steps of benches as one of pytest-benchmark's files; None without any."""
    files = [measured(out, name) for name in BENCHES]
    found = [
        json.loads(file.read_text()) for file in files if file.exists() and file.stat().st_size
    ]
    if not found:
        return None
    return {**found[0], "benchmarks": [case for each in found for case in each["benchmarks"]]}


def run(step: Step, log: Path, left: float) -> dict[str, object]:
    """Runs one step; its output goes to the log, its end to the screen if it failed."""
    seconds = max(1, min(step.seconds, int(left)))
    environment = {**os.environ, "TAYLOR_KERNELS_CUDA": "on"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    started = time.monotonic()
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env=environment,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 124, (error.stdout or b"").decode(errors="replace")
        output += f"\nstopped after {seconds} s\n"
    except OSError as error:
        code, output = 127, f"{error}\n"
    took = round(time.monotonic() - started, 1)
    with log.open("a") as file:
        file.write(f"$ {' '.join(step.command)}\n{output}\n[exit code {code}, {took} s]\n\n")
    lines = [line for line in output.splitlines() if line.strip()]
    if code:
        print("\n".join(lines[-25:]))
    return {
        "step": step.name,
        "ok": code == 0,
        "code": code,
        "seconds": took,
        "last_line": lines[-1] if lines else "",
    }


def gpu() -> dict[str, str] | None:
    """The GPU and the versions around it, or None."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
    }


def main() -> int:
    machine = gpu()
    if machine is None:
        print(
            f"gpu-check: {sys.executable} has no PyTorch that sees an NVIDIA GPU; run it where one"
        )
        print("does, or name that Python: make gpu-check PYTHON=...")
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu-check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    for old in (log, *(measured(out, name) for name in BENCHES)):
        old.unlink(missing_ok=True)
    results = []
    end = time.monotonic() + TOTAL
    for step in steps(out):
        print(f"{step.name} ...", flush=True)
        results.append(run(step, log, end - time.monotonic()))
        report = {"machine": machine, "steps": results, "ok": all(r["ok"] for r in results)}
        report["bench"] = gather(out)
        (out / "gpu-check.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{machine['gpu']}, torch {machine['torch']}; log: {log}")
    for name in BENCHES:
        measured(out, name).unlink(missing_ok=True)  # all of it is in gpu-check.json
    for result in results:
        verdict = "pass" if result["ok"] else f"FAIL ({result['code']})"
        print(
            f"{result['step']:<14} {verdict:<10} {result['seconds']:>6} s  "
            f"{str(result['last_line'])[:90]}"
        )
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
