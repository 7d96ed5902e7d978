"""The pruning curves of the README: accuracy against filters removed, as two SVGs.

    python -m tools.docs_picture

GitHub and the site show docs/assets/pruning-light.svg or pruning-dark.svg, by the reader's theme.
Each file names the figures that it was drawn from by a hash, so that a test can tell when the study
has newer ones.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench/results/study/result.json"
ASSETS = ROOT / "docs/assets"
#: Criterion in the study -> (label, line style, marker). Norms are shown as they rank best.
LINES = {
    "taylor_so_diag": ("taylor_so_diag", "-", "s"),
    "taylor_fo_bn": ("taylor_fo_bn", "-", "o"),
    "magnitude_l2, unscaled": ("magnitude (L2)", (0, (5, 1.5)), "^"),
    "random": ("random", (0, (1.5, 1.2)), "v"),
}
#: Colours of Okabe and Ito, one per line, lighter on a dark page; then text and grid.
THEMES = {
    "light": (("#d55e00", "#0072b2", "#a8508a", "#8a6d00"), "#1f2328", "#d9dee3"),
    "dark": (("#f08a4b", "#56b4e9", "#e29bc4", "#f0c04f"), "#e6edf3", "#3d444d"),
}
TITLES = {"cnn": "CNN", "resnet": "ResNet"}

#: Title of a panel -> criterion -> a path per seed of (% of filters removed, accuracy in %).
Curves = dict[str, dict[str, list[list[tuple[float, float]]]]]


def curves(result: dict[str, Any]) -> Curves:
    """The curves that were scored again at every step, without training."""
    found: Curves = {}
    for network in result["networks"]:
        total = sum(network["widths"].values())
        title = f"{TITLES[network['architecture']]}, {total} filters"
        lines = found.setdefault(title, {name: [] for name in LINES})
        for name in LINES:
            points = network["criteria"][name]["rescored"]
            lines[name].append([(100 * p["removed"] / total, 100 * p["accuracy"]) for p in points])
    return found


def digest(found: Curves) -> str:
    """A hash of what is drawn and how it is named; not of how matplotlib draws it."""
    content = json.dumps([found, list(LINES.values())], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def draw(found: Curves, theme: str) -> str:
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    colours, ink, line = THEMES[theme]
    style: Any = {
        "font.size": 10.5, "svg.fonttype": "path", "svg.hashsalt": "taylor-kernels",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": line,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": line, "grid.linewidth": 0.7,
        "text.color": ink, "axes.labelcolor": ink, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "xtick.color": line, "ytick.color": line, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(8.8, 3.5), layout="constrained")
        panels = drawing.subplots(1, len(found), sharey=True)
        for panel, (title, lines) in zip(panels, found.items(), strict=True):
            for colour, (name, paths) in zip(colours, lines.items(), strict=True):
                label, dashes, marker = LINES[name]
                points = np.asarray(paths)
                x, y = points[0, :, 0], points[:, :, 1]
                panel.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.13, lw=0)
                panel.plot(
                    x, y.mean(0), color=colour, ls=dashes, lw=2, marker=marker, ms=4.5,
                    markevery=2, label=label,
                )  # fmt: skip
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
            panel.set_xlabel("filters removed, %")
            panel.set_xlim(0, 90)
            panel.set_ylim(0, 103)
        panels[0].set_ylabel("test accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # Lines that end in blanks would be changed by editors, and the file with them.
    text = "\n".join(line.rstrip() for line in buffer.getvalue().decode().splitlines())
    return f"{text}\n<!-- figures: {digest(found)} -->\n"


def path(theme: str) -> Path:
    return ASSETS / f"pruning-{theme}.svg"


def main() -> None:
    found = curves(json.loads(SOURCE.read_text()))
    ASSETS.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        path(theme).write_text(draw(found, theme))
        print(f"wrote {path(theme).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
