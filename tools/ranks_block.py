"""What docs/distributed.md quotes of the kept run over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.markdown import ms, table

#: Relative to the repository; `python -m bench.ranks` writes it.
RANKS = Path("bench/results/ranks/result.json")
HEAD = (
    "criterion", "ranks", "training step, ms", "the same, watched", "update", "pruning",
    "sent by a rank at a pruning", "received",
)  # fmt: skip


def ranks_block(result: dict[str, Any]) -> str:
    rows = []
    for size, criteria in result["ranks"].items():
        for criterion, one in criteria.items():
            times = [ms(one[key]) for key in ("train", "watched", "update", "pruning")]
            sent = f"{one['bytes'] / 1e3:.1f} kB"
            name = f"{int(size):,}{' (simulated)' * (int(size) > 4)}"
            received = f"{one['bytes'] * int(size) / 1e6:.2f} MB"
            rows.append([f"`{criterion}`", name, *times, sent, received])
    settings, machine = result["settings"], result["machine"]
    filters = next(iter(next(iter(result["ranks"].values())).values()))["filters"]
    return "\n\n".join(
        (
            table(HEAD, rows),
            f"ResNet-18 ({filters:,} filters that can be pruned), {settings['batch']} images of "
            f"{settings['image']}² a rank, a pruning every {settings['every']} minibatches; "
            "processes of one thread with gloo on the two cores of one machine, which four of them "
            "share. Of 1,000 ranks one was run, and its collective was a copy of its own bytes: "
            "that is what adding them up takes, without a network. "
            f"{machine['processor']}; PyTorch {machine['torch']}. Source: `{RANKS.as_posix()}`, "
            "written by `python -m bench.ranks`.",
        )
    )
