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
    empty_layers,
    findings_table,
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
    head = ["network, data", *first.columns]
    return Table(head, rows, caption, numeric=range(3, len(head)))


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
            method: 100 * mean(p["accuracy"] for p in found)
            for method in ("SynFlow", "random", "lottery ticket")
            if (found := chosen(points, method, PLAIN, quoted))
        }
        full = 100 * mean(each["accuracy"] for each in dense)
        said = ", ".join(f"{method} {value:.1f}" for method, value in best.items())
        words.append(f"{', '.join(problem)}: {full:.1f} → {said} at {percent(quoted)}")
    return {
        "accuracy": "; ".join(words),
        "compression": f"{1 / (1 - QUOTED):.0f}×{_worst(result)}",
    }


def _worst(result: Json) -> str:
    """How far SynFlow goes with no layer empty."""
    fine = [
        s
        for s in sparsities(_of(result, problems_of(result)[0])[0])
        if not any(
            empty_layers(point)
            for problem in problems_of(result)
            for point in chosen(_of(result, problem)[0], "SynFlow", PLAIN, s)
        )
    ]
    return f"; SynFlow empties no layer up to {1 / (1 - fine[-1]):.0f}×" if fine else ""


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
