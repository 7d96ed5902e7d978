"""What the documentation says of doors into other libraries, from kept results of benches."""

from __future__ import annotations

from bench.doors_report import memory_share
from bench.figures import Results
from bench.markdown import ms, number, table
from bench.report import machine_line

_MEASURED = {
    "taylor": "Taylor scores of all groups of ResNet-50",
    "hessian": "Hessian of ResNet-18, 32 images, passes included",
    "obdc": "OBDC of a ConvNet, 32 images, passes included",
}

_SHORT = {"taylor": "Taylor", "hessian": "Hessian", "obdc": "OBDC"}


def doors_row(results: Results) -> list[str]:
    """Torch-Pruning's row of the table: import, what gets faster, by how much, what gets right."""
    faster = []
    for case in results.of("torch_pruning"):
        ours, theirs = case.ours, case.fastest(role="peer")
        if ours is not None and theirs is not None:
            faster.append(f"{_SHORT[case.name[1]]} {theirs.median / ours.median:.1f}×")
    return [
        "[Torch-Pruning](docs/torch-pruning.md)",
        "`integrations.torch_pruning`",
        "Taylor, Hessian and OBDC importances",
        ", ".join(faster),
        "BatchNorm, depthwise, grouped and frozen layers; every example counts",
    ]


def doors_table(results: Results) -> str:
    """A row for each library."""
    head = ["library", "import", "what gets faster", "by", "what gets right"]
    lines = [head, [":--"] * len(head), doors_row(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures_block(results: Results) -> str:
    """Time and peak memory of each importance beside Torch-Pruning's own."""
    rows = []
    for case in results.of("torch_pruning"):
        ours, theirs = case.ours, case.fastest(role="peer")
        if ours is None or theirs is None:
            continue
        share = memory_share(case)
        rows.append(
            [
                _MEASURED[case.name[1]],
                ms(theirs.median),
                ms(ours.median),
                f"{theirs.median / ours.median:.1f}×",
                number(theirs.info["peak_mib"], "{:.1f}"),
                number(ours.info["peak_mib"], "{:.1f}"),
                "–" if share is None else f"{100 * share:.0f}%",
            ]
        )
    head = ["", "its own, ms", "here, ms", "faster", "its peak MiB", "peak MiB here", "share"]
    source = f"Source: `{results.path.as_posix()}`, written by the command in `bench/README.md`."
    return f"{table(head, rows)}\n\n{machine_line(results)}. {source}"
