"""What `make gpu-check` runs on a machine with an NVIDIA GPU: build, test, sanitize, bench.

    python3 tools/gpu_check.py               # results in $OUT, or bench/results/gpu-check
    python3 tools/gpu_check.py build tune    # these steps, with the time of the others

Needs no network: the system's Python with torch, triton, numpy, pytest, pybind11, cmake and ninja,
and the CUDA toolkit; pytest-benchmark for the benches. What else is missing is named, and left out.
Steps have a time limit each, add to the log and to the results as they go, and a failure does not
stop the next; a summary comes last. The exit code is 1 if any failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a file, it is started without it

from tools.gpu_steps import Step, run  # noqa: E402
from tools.gpu_summary import summary  # noqa: E402

#: Step -> its cases, and the seconds in which cases begin. Those of `bench` fit the time with
#: torch.compile's cold start; `python -m bench` runs all.
BENCHES = {
    "bench": (
        "(resnet50 or llama-bf16 or nchw or channels_last or scoring_step) and not fisher",
        85,
    ),
    "fisher-step": ("fisher_step", 45),
    "fisher-layers": ("conv2d_fisher", 55),
}
#: For the case that began last to end.
SPARE = 20.0
#: Seconds for all steps. What one leaves, the next has.
TOTAL = 560
SANITIZERS = {"memcheck": 35, "racecheck": 45, "initcheck": 40, "synccheck": 40}
#: Steps that run only where they are named.
ON_DEMAND = ("initcheck", "synccheck", "tune")
#: Processes that share the tests: most of their time Triton compiles, on one core each.
SHARES = max(1, min(12, (os.cpu_count() or 1) - 2))
#: Nothing that a machine may lack, nor a plugin that is there by chance.
PLAIN_PYTEST = ("-o", "addopts=--strict-markers --import-mode=importlib", "-p", "no:cacheprovider")
#: Package -> what is left out without it.
WANTED = {
    "pytest_benchmark": "the benches",
    "torch_pruning": "Torch-Pruning as a peer",
    "opacus": "Opacus as a peer",
    "backpack": "BackPACK as a peer",
    "typer": "the command line",
    "rich": "the command line, and the oracle's progress",
}


def steps(names: list[str], out: Path) -> list[Step]:
    """The named steps; they share the time of all if they need not be done in their own."""
    python = sys.executable
    every = [
        Step("build", [[python, "setup.py", "build_ext", "--inplace"]], 90.0, environment=card()),
        tests("tests", "tests/gpu", SHARES, 90.0),
        tests("pruning", "tests/pruning/test_on_gpu.py", min(SHARES, 6), 45.0),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    script = [python, str(ROOT / "tools" / "sanitize.py")]
    for tool, seconds in SANITIZERS.items():
        options = ["--error-exitcode", "9", "--tool", tool]
        if tool != "initcheck":  # which must see PyTorch's kernels write what ours read
            options += ["--kernel-regex", "kns=_ZN2tk"]
        every.append(Step(tool, [[sanitizer, *options, *script]], seconds))
    for name, (cases, seconds) in BENCHES.items():
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "bench", "--quick"]
        command += ["-k", cases, f"--benchmark-json={measured(out, name)}"]
        every.append(Step(name, [command], seconds + SPARE, SPARE))
    tune = [python, "-m", "tools.tune_fisher", f"--out={out / 'tune_fisher.json'}"]
    every.append(Step("tune", [tune], 200.0, SPARE))
    there = [step.name for step in every]
    wrong = sorted(set(names) - set(there))
    if wrong:
        raise SystemExit(f"gpu-check: {wrong[0]!r} is no step; there are {', '.join(there)}")
    chosen = [s for s in every if (s.name in names if names else s.name not in ON_DEMAND)]
    stretch = max(1.0, TOTAL / sum(step.seconds for step in chosen))
    return [step._replace(seconds=step.seconds * stretch) for step in chosen]


def tests(name: str, where: str, shares: int, seconds: float) -> Step:
    """Tests, by so many processes at once."""
    command = [sys.executable, "-m", "pytest", *PLAIN_PYTEST, "-v", "--tb=short", where]
    commands = [[*command, f"--share={i + 1}/{shares}"] for i in range(shares)]
    return Step(
        name,
        commands,
        seconds,
        environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TAYLOR_KERNELS_SAMPLE": "all"},
    )


def card() -> dict[str, str]:
    """The build's environment: for the GPU that is here alone, which takes a third of the time."""
    import torch

    if "CUDAARCHS" in os.environ or not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"CUDAARCHS": f"{major}{minor}-real"}


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


def missing() -> list[str]:
    """What this machine lacks, and what is left out for it."""
    return [f"no {name}: without {what}" for name, what in WANTED.items() if not find_spec(name)]


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
    report: dict[str, object] = {"machine": machine, "missing": missing(), "steps": []}
    results: list[dict[str, object]] = []
    end = time.monotonic()
    last = end + TOTAL
    for step in chosen:
        print(f"{step.name} ...", flush=True)
        end += step.seconds  # not from now on: it has what the steps before have left
        results.append(run(step, log, min(end, last) - time.monotonic()))
        report |= {"steps": results, "ok": all(r["ok"] for r in results), "bench": gather(out)}
        (out / "gpu-check.json").write_text(json.dumps(report, indent=2) + "\n")
    for name in BENCHES:
        measured(out, name).unlink(missing_ok=True)  # all of it is in gpu-check.json
    print(f"log: {log}\n{summary(report)}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
