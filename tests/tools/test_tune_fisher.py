"""The search for tiles of conv2d_fisher in Triton runs, so that time on a GPU is not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.programs import Run, run_module
from tests.helpers.samples import some

pytestmark = pytest.mark.long


def tune(*arguments: str, **environment: str) -> Run:
    pytest.importorskip("triton", reason="Triton is not installed")
    # The interpreter is to be chosen before Triton is imported.
    ahead = "TRITON_INTERPRET" not in environment
    return run_module("tools.tune_fisher", *arguments, optimizers=ahead, **environment)


def test_dry_run_names_every_layer_and_choice() -> None:
    done = tune("--dry-run", "--precisions", "bf16,tf32,fp32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) % 3 == 0
    for name in ("stem.0", "classifier", "attention", "down"):
        assert sum(name in line.split() for line in lines) == 3
    assert all("tiles" in line and "depths" in line for line in lines)


def test_finds_the_fastest_of_a_layer(tmp_path: Path) -> None:
    """In a precision that each run draws: the interpreter is slow."""
    out, precisions = tmp_path / "found.json", some(["bf16", "fp32"], 1)
    small = ("--networks", "small", "--device", "cpu", "--rounds", "1", "--out", str(out))
    done = tune(*small, "--precisions", ",".join(precisions), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["found"]
    assert [case["precision"] for case in found] == precisions
    for case in found:
        assert case["floor"] > 0
        assert 0 < case["best"]["seconds"] <= case["default"]["seconds"]
        assert len(case["tried"]) > 10
        assert all(tried["error"] < 16 for tried in case["tried"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu() -> None:
    done = tune()
    assert done.returncode == 2
    assert "no GPU" in done.stdout
