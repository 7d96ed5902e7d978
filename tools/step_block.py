"""What docs/benchmarks.md quotes of `python -m bench.bench_pruner_step`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.bench_pruner_step import LIMIT, ROUNDS_COMPACTED, over_plain
from bench.markdown import table

#: Relative to the repository.
STEP = Path("bench/results/step/result.json")


def step_block(result: dict[str, Any]) -> str:
    """Of each network a step without and with a pruner, and the ratio beside its limit."""
    head = ["", "plain step, ms", "with a pruner, ms", "over plain", "rounds", f"limit {LIMIT:.2f}"]
    head += ["parameters after compact()", "over plain then"]
    rows = []
    for label, found in result["rounds"].items():
        ms = [1e3 * statistics.median(found[way]) / result["every"] for way in found]
        ratio = over_plain(found)
        # The range says what the machine's own noise is.
        each = [a / b for a, b in zip(found["with a pruner"], found["plain"], strict=True)]
        rows.append(
            [
                label,
                *(f"{value:.0f}" for value in ms),
                f"{ratio:.3f} ({min(each):.3f}–{max(each):.3f})",
                str(len(each)),
                "ok" if ratio <= LIMIT else "not reached",
                f"{100 * result['compacted'][label]['parameters']:.0f}%",
                f"{over_plain(result['compacted'][label]['rounds']):.2f}",
            ]
        )
    versions = result["versions"]
    return "\n\n".join(
        (
            table(head, rows),
            f"{result['images']} images of {result['size']}², `taylor_fo_bn`, "
            f"`every={result['every']}`: median and range of rounds of {result['every']} "
            f"steps, each with one pruning, in turns with plain steps; then of "
            f"{ROUNDS_COMPACTED} rounds after `compact()`. "
            f"{result['machine']['processor']}, {result['machine']['threads']} thread; PyTorch "
            f"{versions['torch']}, pytorchcv {versions['pytorchcv']}. Source: "
            f"`{STEP.as_posix()}`, written by `python -m bench.bench_pruner_step`.",
        )
    )
