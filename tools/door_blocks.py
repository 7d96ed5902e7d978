"""What the documentation says of doors into other libraries, from kept results of benches."""

from __future__ import annotations

from bench.doors_report import beyond_a_step, memory_share
from bench.figures import Case, Results
from bench.markdown import ms, number, table
from bench.report import machine_line

_MEASURED = {
    "taylor": "Taylor scores of all groups of ResNet-50",
    "hessian": "Hessian of ResNet-18, 32 images, passes included",
    "obdc": "OBDC of a ConvNet, 32 images, passes included",
}

_NAMES = {
    "ef-resnet18": "Fisher of ResNet-18",
    "ggn-resnet18": "GGN of ResNet-18",
    "ef-vit": "Fisher of a ViT",
    "ggn-vit": "GGN of a ViT",
    "sum_grad_squared-convnet": "squares of a ConvNet",
    "sum_grad_squared-resnet18": "squares of ResNet-18",
    "batch_l2-convnet": "norms of a ConvNet",
    "batch_l2-resnet18": "norms of ResNet-18",
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


def laplace_row(results: Results) -> list[str]:
    return [
        "[laplace-torch](docs/laplace.md)",
        "`integrations.laplace`",
        "diagonal empirical Fisher and Gauss-Newton matrix",
        _faster(results.of("laplace"), _NAMES),
        "memory of a few copies of the parameters; dict inputs, tokens, last layers",
    ]


def backpack_row(results: Results) -> list[str]:
    return [
        "[BackPACK](docs/backpack.md)",
        "`integrations.backpack`",
        "`sum_grad_squared`, `batch_l2`",
        _faster(results.of("backpack"), _NAMES),
        "groups, padding modes, norms; no gradients of all examples",
    ]


def _faster(cases: list[Case], names: dict[str, str]) -> str:
    return ", ".join(
        f"{names[case.name[1]]} {theirs.median / ours.median:.1f}×"
        for case in cases
        if (ours := case.ours) and (theirs := case.fastest(role="peer"))
    )


def doors_table(torch_pruning: Results, laplace: Results, backpack: Results) -> str:
    """A row for each library, from the results of its door."""
    head = ["library", "import", "what gets faster", "by", "what gets right"]
    rows = [doors_row(torch_pruning), laplace_row(laplace), backpack_row(backpack)]
    lines = [head, [":--"] * len(head), *rows]
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
    return f"{table(head, rows)}\n\n{_source(results)}"


def laplace_block(results: Results) -> str:
    """Every backend's time over a training step's, and its memory beyond that step."""
    rows = []
    for case in results.of("laplace"):
        plain = case.get("plain")
        for entry in case.entries:
            if plain is None or entry is plain:
                continue
            beyond = beyond_a_step(case, entry.label)
            rows.append(
                [
                    _NAMES[case.name[1]],
                    "here" if entry is case.ours else entry.label,
                    ms(entry.median),
                    f"{entry.median / plain.median:.1f}",
                    number(entry.info["peak_mib"], "{:.0f}"),
                    number(beyond and round(beyond, 1) + 0.0, "{:.1f}"),
                ]
            )
    head = ["", "backend", "ms", "× a training step", "peak MiB", "beyond a step, × parameters"]
    return f"{table(head, rows)}\n\n{_source(results)}"


def backpack_block(results: Results) -> str:
    """Time and peak memory of a whole step with each field."""
    rows = []
    for case in results.of("backpack"):
        ours, theirs = case.ours, case.fastest(role="peer")
        if ours is None or theirs is None:
            continue
        rows.append(
            [
                _NAMES[case.name[1]],
                ms(theirs.median),
                ms(ours.median),
                f"{theirs.median / ours.median:.1f}×",
                number(theirs.info["peak_mib"], "{:.0f}"),
                number(ours.info["peak_mib"], "{:.0f}"),
            ]
        )
    head = ["a step with", "BackPACK, ms", "here, ms", "faster", "its peak MiB", "peak MiB here"]
    return f"{table(head, rows)}\n\n{_source(results)}"


def _source(results: Results) -> str:
    source = f"Source: `{results.path.as_posix()}`, written by the command in `bench/README.md`."
    return f"{machine_line(results)}. {source}"
