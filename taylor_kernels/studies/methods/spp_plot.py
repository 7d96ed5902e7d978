"""The plot of the SPP study: probabilities of single columns, and recoveries, over iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of
from taylor_kernels.studies.plotting import Plot, Theme

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json


def plot(result: Json) -> Plot:
    """For each problem the first seed of the way that removes most: twelve columns of its widest
    layer, and how often any column of the network has recovered."""

    def drawn(theme: Theme) -> Drawing:
        problems = problems_of(result)
        way = [way for way in ways_of(result) if way.startswith("SPP")][-1]
        drawing = Drawing(figsize=(10.5, 3.2 * len(problems)), layout="constrained")
        axes = drawing.subplots(len(problems), 2, squeeze=False)
        for (left, right), problem in zip(axes, problems, strict=True):
            run = runs_of(result, way, problem)[0]
            left.plot(run["iterations"], run["shown"], linewidth=1.2)
            left.set_title(f"{way}, {', '.join(problem)}: columns of {run['watched']!r}")
            left.set_ylabel("probability to be masked")
            right.plot(run["iterations"], run["recovered"], linewidth=1.6)
            right.set_title(f"{way}, {', '.join(problem)}")
            right.set_ylabel("recoveries so far")
            for ax in (left, right):
                ax.set_xlabel("iteration")
                ax.set_ylim(bottom=0)
        return drawing

    return drawn
