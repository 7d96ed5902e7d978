"""The plot of a results file: how many times as long each peer takes as ours."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.figures import Case, Results

# Okabe and Ito's palette: told apart with any colour vision. The order is the bars'.
COLOURS = {
    "read floor": "#999999",
    "torch.compile": "#0072B2",
    "eager": "#E69F00",
    "torch._foreach": "#009E73",
    "einsum": "#CC79A7",
    "Torch-Pruning": "#D55E00",
}


def _ratios(case: Case) -> dict[str, float]:
    ours = case.ours
    assert ours is not None
    found = {
        "read floor": case.fastest(role="floor"),
        "torch.compile": case.get("torch.compile"),
        "eager": case.get("eager"),
        "torch._foreach": case.get("torch._foreach"),
        "einsum": case.get("einsum"),
        "Torch-Pruning": case.get("Torch-Pruning sweep"),
    }
    return {name: entry.median / ours.median for name, entry in found.items() if entry}


def pyplot() -> ModuleType:
    """matplotlib's, for files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(results: Results, path: Path) -> None:
    """Write the bars of every op's cases as a PNG."""
    cases = [
        c
        for bench in ("filter_moments", "gate_gradients")
        for c in results.of(bench)
        if c.ours is not None
    ]
    if not cases:
        return
    plt = pyplot()
    ratios = [_ratios(case) for case in cases]
    bars = sum(len(each) for each in ratios)
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.2 * bars + 0.15 * len(cases)))
    at, ticks = 0.0, []
    for each in ratios:
        start = at
        for name, ratio in each.items():
            axes.barh(at, ratio - 1, left=1, color=COLOURS[name], height=0.85)
            text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
            axes.annotate(
                text,
                (ratio, at),
                xytext=(4 if ratio >= 1 else -4, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center",
                fontsize=7,
            )
            at += 1
        ticks.append((start + at - 1) / 2)
        at += 0.8
    axes.set_yticks(ticks, [" ".join(c.name) for c in cases], fontsize=8)
    axes.set_ylim(at - 0.5, -1)
    axes.set_xscale("log")
    largest = max(max(each.values()) for each in ratios)
    smallest = min(min(each.values()) for each in ratios)
    axes.set_xlim(min(0.5, smallest / 1.8), largest * 1.8)
    marks = [m for m in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if smallest / 1.5 < m < largest]
    axes.set_xticks(marks, [f"{m:g}×" for m in marks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time relative to ours (log scale); right of 1×, ours is faster")
    used = [name for name in COLOURS if any(name in each for each in ratios)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in used]
    axes.legend(
        handles, used, ncols=len(used), loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
        fontsize=7, columnspacing=1.0, handlelength=1.2,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
