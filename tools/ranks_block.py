"""What docs/distributed.md quotes of the kept result of `python -m bench.ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.markdown import ms, table
from bench.ranks import SIMULATED

#: Relative to the repository.
RANKS = Path("bench/results/ranks/result.json")
_HEAD = (
    "processes", "criterion", "training step, ms", "`step()`, ms", "pruning `step()`, ms",
    "sent at a pruning", "by the formula", "on the wire",
)  # fmt: skip


def ranks_block(result: dict[str, Any]) -> str:
    """A row for each number of processes and criterion; what a rank of many would take."""
    rows, many = [], ""
    for size, found in result["ranks"].items():
        for criterion, one in found.items():
            rows.append(
                [
                    f"{int(size):,}" + (", simulated" if int(size) >= SIMULATED else ""),
                    f"`{criterion}`",
                    *(ms(one[key]) for key in ("train", "update", "pruning")),
                    f"{one['bytes']:,.0f} B",
                    f"{one['formula']:,} B",
                    "–" if one["wire"] is None else f"{one['wire']:,.0f} B",
                ]
            )
        if int(size) >= SIMULATED:
            memory = ", ".join(
                f"{one['memory'] / 2**20:,.0f} MiB under `{criterion}`, where it receives "
                f"{int(size) * one['formula'] / 2**20:,.0f}"
                for criterion, one in found.items()
                if one["memory"] is not None
            )
            many = f" A pruning of {int(size):,} ranks takes one {memory}." if memory else ""
    machine, settings = result["machine"], result["settings"]
    filters = next(iter(result["ranks"]["1"].values()))["filters"]
    return (
        f"{table(_HEAD, rows)}\n\n"
        f"ResNet-18 ({filters:,} filters that can go), {settings['batch']} images of "
        f"{settings['image']}² a process, a pruning every {settings['every']} minibatches; "
        f"gloo, one thread a process, {machine['processor']} with {machine['cores']} cores, which "
        f"more processes share; PyTorch {machine['torch']}. On the wire: of the loopback "
        "device, for each process, headers included; each of R payloads goes to R − 1 others."
        f"{many} Source: `{RANKS.as_posix()}`, written by `python -m bench.ranks`."
    )
