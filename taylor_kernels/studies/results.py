"""What a study writes: result.json with its circumstances, and the page beside it."""

from __future__ import annotations

import json
import math
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from taylor_kernels.files import write_atomically
from taylor_kernels.studies.report import Report, render
from taylor_kernels.system import cpu_model, package_versions

#: An object of JSON.
Json = dict[str, Any]
_DISTRIBUTIONS = (
    "taylor-kernels", "torch", "torch-pruning", "scikit-learn", "scipy", "numpy", "safetensors",
)  # fmt: skip


def circumstances(command: str, device: torch.device, threads: int, seconds: float) -> Json:
    """How a result came about: command, date, duration, versions, machine."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | package_versions(*_DISTRIBUTIONS),
        "machine": {
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cpu": cpu_model(),
            "threads": threads,
        },
    }


def footer(result: Json) -> str:
    """The circumstances of a result in words."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {threads_in_words(result)}"
    return (
        f"`{result['command']}`\n\n{result['date']}, {result['seconds']:.0f} s, {where}. "
        f"{versions}. All numbers are in `result.json`."
    )


def threads_in_words(result: Json) -> str:
    """The threads that a result was measured with, in words."""
    number = result["machine"]["threads"]
    return f"{number} thread{'s' if number > 1 else ''}"


def write_results(folder: Path, result: Json, report: Report) -> None:
    """Write `result.json` and `report.html`, each whole or not at all."""
    _write(folder / "report.html", render(report))
    _write(folder / "result.json", readable(result))


def _write(file: Path, text: str) -> None:
    write_atomically(file, lambda part: part.write(text.encode()))


def readable(result: Json) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(result, indent=1)
    flat = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    return flat + "\n"


def rounded(value: Any, digits: int = 6) -> Any:
    """Plain JSON: floats to so many significant digits, and null for those that are not finite."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
