"""What `make gpu-check` runs on a machine with an NVIDIA GPU: build, test, sanitize, bench.

    python3 tools/gpu_check.py               # results in $OUT, or bench/results/gpu-check
    python3 tools/gpu_check.py build tune    # these steps, with the time of the others

Needs no network: the system's Python with torch, pybind11, cmake, ninja, pytest and
pytest-benchmark, and the CUDA toolkit; for the pruner's tests rich and hypothesis.
Steps have a time limit each, and a failure does not stop the next; the exit code is 1 if any
failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: step -> its cases, and the seconds in which cases begin. Those of `bench` fit the time with
#: torch.compile's cold start; `python -m bench` runs all.
BENCHES = {
    "bench": (
        "(resnet50 or llama-bf16 or nchw or channels_last or scoring_step) and not fisher",
        120,
    ),
    "fisher-step": ("fisher_step", 50),
    "fisher-layers": ("conv2d_fisher", 70),
}
#: Seconds for all steps; what the first leave is what the last have.
TOTAL = 560
SANITIZERS = {"memcheck": 40, "racecheck": 50, "initcheck": 40, "synccheck": 40}
#: Steps that run only where they are named.
ON_DEMAND = ("initcheck", "synccheck", "tune")


class Step(NamedTuple):
    name: str
    commands: list[list[str]]  # run at the same time
    seconds: float
    spare: float = 0.0  # of them, for the last case to end; the commands are told the others


def steps(names: list[str], out: Path) -> list[Step]:
    """The named steps; they share the time of all if they need not be done in their own."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    fisher = "tests/gpu/test_fisher_gpu.py"
    sanitizer = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9"]
    script = [python, str(ROOT / "tools" / "sanitize.py")]
    bench = [*tests, "bench", "--quick"]
    # Most of the time of the tests Triton compiles, on one core each.
    parallel = [
        [*tests, fisher, "-k", "triton"],
        [*tests, fisher, "-k", "not triton"],
        [*tests, "tests/gpu", f"--ignore={fisher}"],
    ]
    every = [
        Step("build", [[python, "setup.py", "build_ext", "--inplace"]], 100.0),
        Step("tests", parallel, 130.0),
        Step("pruning", [[*tests, "tests/pruning/test_on_gpu.py"]], 60.0),
    ]
    for tool, seconds in SANITIZERS.items():
        every.append(Step(tool, [[*sanitizer, "--tool", tool, *script]], seconds))
    for name, (cases, seconds) in BENCHES.items():
        command = [*bench, "-k", cases, f"--benchmark-json={measured(out, name)}"]
        every.append(Step(name, [command], seconds + 30.0, 30.0))
    tune = [python, "-m", "tools.tune_fisher", f"--out={out / 'tune_fisher.json'}"]
    every.append(Step("tune", [tune], 200.0, 20.0))
    there = [step.name for step in every]
    wrong = sorted(set(names) - set(there))
    if wrong:
        raise SystemExit(f"gpu-check: {wrong[0]!r} is no step; there are {', '.join(there)}")
    chosen = [s for s in every if (s.name in names if names else s.name not in ON_DEMAND)]
    stretch = max(1.0, TOTAL / sum(step.seconds for step in chosen))
    return [step._replace(seconds=step.seconds * stretch) for step in chosen]


def measured(out: Path, name: str) -> Path:
    """Where a step of benches leaves its results."""
    return out / f"{name}.json"


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
    seconds = min(step.seconds, left)
    if seconds <= step.spare:
        return {"step": step.name, "ok": False, "code": 124, "seconds": 0, "last_line": "no time"}
    commands = step.commands
    if step.spare:
        commands = [[*command, f"--seconds={seconds - step.spare:.0f}"] for command in commands]
    environment = {**os.environ, "TAYLOR_KERNELS_CUDA": "on"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    started = time.monotonic()
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(len(commands)) as pool:
        try:
            done = list(pool.map(lambda c: finish(c, environment, seconds, running), commands))
        finally:  # an interrupt reaches no process of another session
            for process in running:
                stop(process)
    took = round(time.monotonic() - started, 1)
    ends = []
    for command, (code, output) in zip(commands, done, strict=True):
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n{output}\n[exit code {code}, {took} s]\n\n")
        lines = [line for line in output.splitlines() if line.strip()]
        if code:
            print("\n".join(lines[-25:]))
        ends += lines[-1:]
    worst = max(code for code, _ in done)
    return {
        "step": step.name,
        "ok": worst == 0,
        "code": worst,
        "seconds": took,
        "last_line": " | ".join(ends),
    }


def finish(
    command: list[str],
    environment: dict[str, str],
    seconds: float,
    running: list[subprocess.Popen[str]],
) -> tuple[int, str]:
    """A command's exit code and output; 124 if it was stopped, 127 if it could not begin."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 127, f"{error}\n"
    running.append(process)
    code, end = 0, ""
    try:
        output, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        stop(process)
        output, _ = process.communicate()
        code, end = 124, f"\nstopped after {seconds:.0f} s\n"
    return (code if code >= 0 else 128 - code), output + end


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a command with all that it started: a compiler or a test that ran on would take the next
    step's time, and the GPU."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("steps", nargs="*", help="all but " + ", ".join(ON_DEMAND) + " if none")
    names = parser.parse_args(arguments).steps
    machine = gpu()
    if machine is None:
        print(
            f"gpu-check: {sys.executable} has no PyTorch that sees an NVIDIA GPU; run it where one"
        )
        print("does, or name that Python: make gpu-check PYTHON=...")
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu-check").resolve()
    chosen = steps(names, out)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    for old in (log, out / "tune_fisher.json", *(measured(out, name) for name in BENCHES)):
        old.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = []
    end = time.monotonic() + TOTAL
    for step in chosen:
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
