"""Pruning at initialization: every method and its controls against sparsity, as `taylor-kernels
at-init` runs them, on two networks without convolutions.

What differs from the papers: networks of 56 and 79 thousand weights on small data, trained for some
epochs by momentum SGD under a cosine; masks from 256 examples; a lottery ticket is cut five times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from taylor_kernels.studies.at_init.findings import (
    HEAD,
    PLAIN,
    chosen,
    findings_table,
    methods,
    percent,
    sparsities,
)
from taylor_kernels.studies.at_init.measure import CONTROLS, Measurement
from taylor_kernels.studies.at_init.pages import figures_table
from taylor_kernels.studies.at_init.plots import curves
from taylor_kernels.studies.at_init.problem import Recipe, digits_problem
from taylor_kernels.studies.at_init.settings import DEFAULT_METHODS, METHODS
from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of
from taylor_kernels.studies.methods.problems import DATA, NETWORKS
from taylor_kernels.studies.methods.study import MethodStudy, Trial, Way
from taylor_kernels.studies.plotting import Plot
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.results import Json

DEEP, SIGNALS = ("MLP of eight layers", "digits"), ("LeNet-300-100", "MNIST-1D")
EPOCHS = {DEEP: 12, SIGNALS: 10}
#: Without one of the command's, so that three seeds take less than ten minutes.
SPARSITIES = (0.5, 0.9, 0.95, 0.98, 0.99, 0.995)
#: At which a method's own accuracy is quoted.
QUOTED = 0.95
#: Methods that the table over all methods quotes -> their names there. SNIP's seeds are too far
#: apart for a mean to say anything; random masks are what the others are to be better than.
SUMMARIZED = {"SynFlow": "SynFlow", "lottery ticket": "lottery ticket", "random": "random masks"}


def sweep(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """A method at every sparsity, with its controls; the dense network where there is no method."""
    measured = _measurement(trial, settings)
    dense = measured.dense()
    if settings["method"] is None:
        return {"accuracy": dense["accuracy"], "dense": dense}
    points = measured.curve(METHODS[settings["method"]], settings["sparsities"])
    quoted = chosen(points, settings["method"], PLAIN, QUOTED) or points
    return {"accuracy": quoted[0]["accuracy"], "dense": dense, "points": points}


def _measurement(trial: Trial, settings: Mapping[str, Any]) -> Measurement:
    data = trial.data
    problem = digits_problem(
        trial.network,
        lambda: NETWORKS[trial.network](data.train.images.shape[1:]),
        data.train,
        data.test,
        trial.seed,
        batches=settings["batches"],
        by=[NETWORKS[trial.network], DATA[trial.data_name]],
    )
    return Measurement(problem, Recipe(settings["epochs"]), trial.cache, trial.log)


def _of(result: Json, problem: tuple[str, str]) -> tuple[list[Json], list[Json]]:
    """The points of all methods, and the dense network's figures, one of each seed."""
    runs = [run for way in ways_of(result) for run in runs_of(result, way, problem)]
    points = [point for run in runs for point in run.get("points", ())]
    return points, [run["dense"] for run in runs_of(result, ways_of(result)[0], problem)]


def table(result: Json) -> Table:
    """Accuracy against sparsity."""
    each = {problem: figures_table(*_of(result, problem)) for problem in problems_of(result)}
    rows = [[", ".join(problem), *row] for problem, one in each.items() for row in one.rows]
    first = next(iter(each.values()))
    dense = "; ".join(
        f"{', '.join(problem)}: {one.caption.rpartition(' ')[2].rstrip('.')}"
        for problem, one in each.items()
    )
    caption = (
        "Accuracy in % against the share of weights that went, mean over seeds. `shuffled`: the "
        "mask within each layer; `drawn anew`: the weights that it keeps. Dense networks: "
        f"{dense}."
    )
    if widest := _widest(result):
        caption += f" Seeds of masks as found are furthest apart for {widest}."
    head = ["network, data", *first.columns]
    return Table(head, rows, caption, numeric=range(3, len(head)))


def _widest(result: Json) -> str:
    """Of masks as found the one whose seeds are furthest apart, and what each seed comes to."""
    found: dict[str, list[float]] = {}
    for problem in problems_of(result):
        points, _ = _of(result, problem)
        for method in methods(points):
            for s in sparsities(points):
                cell = f"{method} at {percent(s)} ({', '.join(problem)})"
                found[cell] = [100 * p["accuracy"] for p in chosen(points, method, PLAIN, s)]
    each = {cell: max(values) - min(values) for cell, values in found.items() if len(values) > 1}
    if not each:
        return ""
    cell = max(each, key=lambda name: each[name])
    return f"{cell}: {', '.join(f'{value:.1f}' for value in found[cell])}"


def statements(result: Json) -> Table:
    """What the data say of published statements."""
    each = {problem: findings_table(_of(result, problem)[0]) for problem in problems_of(result)}
    rows = [[", ".join(problem), *row] for problem, one in each.items() for row in one.rows]
    caption = next(iter(each.values())).caption
    return Table(["network, data", *HEAD], rows, caption, numeric=())


def summary(result: Json) -> dict[str, str]:
    words = []
    for problem in problems_of(result):
        points, dense = _of(result, problem)
        quoted = QUOTED if QUOTED in sparsities(points) else sparsities(points)[0]
        best = {
            words: 100 * mean(p["accuracy"] for p in found)
            for method, words in SUMMARIZED.items()
            if (found := chosen(points, method, PLAIN, quoted))
        }
        full = 100 * mean(each["accuracy"] for each in dense)
        said = ", ".join(f"{name} {value:.1f}" for name, value in best.items())
        words.append(f"{', '.join(problem)}: {full:.1f} → {said}")
    went = f"{1 / (1 - quoted):.0f}× ({percent(quoted)} of the weights go)"
    return {"accuracy": "; ".join(words), "compression": went}


def plot(result: Json) -> Plot:
    networks: Sequence[tuple[str, Sequence[Json], Sequence[Json]]] = [
        (", ".join(problem), *_of(result, problem)) for problem in problems_of(result)
    ]
    return curves(networks)


def _way(method: str | None) -> Way:
    return Way(
        sweep,
        {
            "method": method,
            "sparsities": list(SPARSITIES),
            "batches": 4,
            "controls": list(CONTROLS),
        },
        {problem: {"epochs": epochs} for problem, epochs in EPOCHS.items()},
    )


STUDY = MethodStudy(
    name="at_init",
    method="Pruning at initialization",
    removes="weights",
    source="SNIP, GraSP, SynFlow, lottery tickets",
    file="taylor_kernels/methods/pruning_at_init.py",
    problems=[DEEP, SIGNALS],
    ways={"dense": _way(None)} | {name: _way(name) for name in DEFAULT_METHODS},
    table=table,
    more={"statements": statements},
    plot=plot,
    summary=summary,
)
