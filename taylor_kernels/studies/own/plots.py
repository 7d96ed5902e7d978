"""The plot of a run of `prune`: plain numbers in, a `Plot` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure as Drawing

from taylor_kernels.studies.plotting import Plot, Theme, series_style

_NAMES = {"flops": "FLOPs", "params": "parameters", "filters": "filters"}


def course(points: Sequence[Mapping[str, float]], pruned_at: float, measure: str) -> Plot:
    """Above: loss or accuracy as training goes on; below: what is left of the model.

    Args:
        points: of the course, in order.
        pruned_at: the minibatch at which the target was met.
        measure: "loss" or "accuracy".
    """

    def plot(theme: Theme) -> Drawing:
        drawing = Drawing(figsize=(9.2, 4.8), layout="constrained")
        above, below = drawing.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        x = [point["minibatch"] for point in points]
        scale = 100 if measure == "accuracy" else 1
        style = series_style(theme, 0)
        above.plot(x, [scale * point[measure] for point in points], lw=2, ms=4.5, **style)
        above.axhline(
            scale * points[0][measure], color=theme.soft, lw=1, ls=":", label="before pruning"
        )
        above.set_ylabel("accuracy, %" if measure == "accuracy" else "loss")
        for number, (name, label) in enumerate(_NAMES.items(), 1):
            kept = [100 * point[name] for point in points]
            below.plot(x, kept, lw=1.8, ms=3.5, label=label, **series_style(theme, number))
        below.set(xlabel="minibatches", ylabel="left, %")
        below.set_ylim(0, 104)
        for panel in (above, below):
            if points[-1]["minibatch"] > pruned_at:
                panel.axvspan(pruned_at, x[-1], color=theme.line, alpha=0.45, lw=0)
        above.legend(loc="best")
        below.legend(loc="lower left", ncols=3)
        above.set_title("As filters go, and (shaded) in fine-tuning")
        return drawing

    return plot
