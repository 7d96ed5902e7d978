"""The plot of the adaptive pruning study: what each way keeps of each convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of
from taylor_kernels.studies.plotting import Plot, Theme

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json


def plot(result: Json) -> Plot:
    """What each way keeps of each convolution, of the first seed: a row a way, so that none hides
    another."""

    def drawn(theme: Theme) -> Drawing:
        problems = problems_of(result)
        drawing = Drawing(figsize=(10.5, 2.6 * len(problems)), layout="constrained")
        panels = drawing.subplots(len(problems), squeeze=False)[:, 0]
        for ax, problem in zip(panels, problems, strict=True):
            found = {way: runs_of(result, way, problem) for way in ways_of(result)}
            rows = {way: runs[0]["filters"] for way, runs in found.items() if runs}
            kept = [[100 * left / count for _, left, count in row] for row in rows.values()]
            image = ax.imshow(kept, vmin=0, vmax=100, aspect="auto", cmap="Blues")
            for y, row in enumerate(rows.values()):
                for x, (_, left, count) in enumerate(row):
                    ink = "white" if left > 0.6 * count else "black"
                    ax.text(x, y, str(left), ha="center", va="center", fontsize=6.5, color=ink)
            ax.set_title(", ".join(problem) + ": filters that each convolution keeps")
            ax.set_yticks(range(len(rows)), list(rows))
            ax.set_xlabel("convolution, in the order of the network; 0: its block has gone")
            ax.grid(visible=False)
        drawing.colorbar(image, ax=list(panels), label="filters kept, %", shrink=0.6)
        return drawing

    return drawn
