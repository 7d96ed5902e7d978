"""What a comparison at initialization shows: its tables and the sections of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from taylor_kernels.studies.at_init.findings import (
    PLAIN,
    chosen,
    empty_layers,
    findings,
    findings_table,
    methods,
    percent,
    sparsities,
)
from taylor_kernels.studies.at_init.measure import CONTROLS
from taylor_kernels.studies.at_init.plots import curves
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.report import Report, Section, Table, Text
from taylor_kernels.studies.results import Json, footer


def figures_table(points: Sequence[Json], dense: Sequence[Json]) -> Table:
    """Accuracy, or loss, of each method and control at each sparsity."""
    every = sparsities(points)
    rows = [
        [method, control, *(_mean(chosen(points, method, control, s)) for s in every)]
        for method in methods(points)
        for control in CONTROLS
        if any(chosen(points, method, control, s) for s in every)
    ]
    key = "Accuracy in %" if "accuracy" in dense[0] else "Loss"
    seeds = f", mean of {len(dense)} seeds" if len(dense) > 1 else ""
    caption = f"{key} against the share of weights that went{seeds}; dense {_mean(dense)}."
    head = ["method", "weights and mask", *map(percent, every)]
    return Table(head, rows, caption, numeric=range(2, len(head)))


def collapse_table(points: Sequence[Json]) -> Table:
    """How many layers of each method have no weight left."""
    every = sparsities(points)
    rows = [
        [method, *(_most(chosen(points, method, PLAIN, s)) for s in every)]
        for method in methods(points)
    ]
    number = len(points[0]["left"])
    caption = f"Of {number} layers so many have no weight left; the worst seed."
    return Table(["method", *map(percent, every)], rows, caption)


def build_report(result: Json, folder: Path) -> Report:
    """The report of a result; writes its plot to `folder` as PNG."""
    points, dense = result["points"], result["dense"]
    figure = draw(
        curves([(result["name"], points, dense)]),
        folder / "at_init.png",
        alt="Accuracy against sparsity, all methods in one panel, then each with its controls.",
        caption="First panel: every method as it is. Others: a method, with its mask shuffled "
        "within each layer, and with kept weights drawn anew. Dotted: the dense network. "
        + ("Lines: means, bands: ranges of the seeds." if len(dense) > 1 else "One seed."),
    )
    said = findings(points)
    sections = [Section("Accuracy against sparsity", [figure, figures_table(points, dense)])]
    sections.append(Section("Layers without a weight", [collapse_table(points)]))
    if said:
        title = "What this confirms, and what it does not"
        sections.append(Section(title, [findings_table(points)]))
    sections.append(Section("How it was done", [Text(_method(result))]))
    return Report(
        title="Which weights of an untrained network are worth keeping?",
        lead=_lead(points, dense),
        sections=sections,
        footer=footer(result),
    )


def _lead(points: Sequence[Json], dense: Sequence[Json]) -> str:
    every = sparsities(points)
    middle = every[len(every) // 2]
    best = {method: _mean(chosen(points, method, PLAIN, middle)) for method in methods(points)}
    what = "accuracy" if "accuracy" in dense[0] else "loss"
    found = ", ".join(f"{method} {value}" for method, value in best.items())
    return f"With {percent(middle)} of the weights gone, {what}: {found}; dense {_mean(dense)}."


def _method(result: Json) -> str:
    settings = result["settings"]
    judged = (
        "the test images"
        if result["kind"] == "digits"
        else settings["val"] or "the first minibatches of the training data"
    )
    return (
        f"Every network is trained for {settings['epochs']} epochs by momentum SGD, learning rate "
        f"{settings['lr']:g} falling to 0 by a cosine, with what is cut held at zero, and judged "
        f"on {judged}. Masks are made from {settings['batches']} minibatches, of all layers "
        "together. A lottery ticket is trained and cut several times, then trained from its first "
        "weights. Seeds decide the start, the order of minibatches and what is drawn."
    )


def _mean(found: Sequence[Json]) -> str:
    if not found:
        return "–"
    if "accuracy" in found[0]:
        return f"{100 * mean(each['accuracy'] for each in found):.1f}"
    return f"{mean(each['loss'] for each in found):.3g}"


def _most(found: Sequence[Json]) -> str:
    return str(max(map(empty_layers, found))) if found else "–"
