"""GSM over filters, a form of ours, beside filters of least magnitude that go at once.

A network is trained, FilterGSM goes on from it, and what it has let decay is removed without
fine-tuning. As many filters of least Σ w² go at once from the same network, which is then
fine-tuned for as many epochs. There is no paper whose settings these are; rate and decay of the
ResNet were chosen on a seed that is not reported, LeNet-5 has the first that were tried on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

from torch import nn

from taylor_kernels.methods.filter_gsm import FilterGSM
from taylor_kernels.studies.methods.pages import accuracy_table, means
from taylor_kernels.studies.methods.shapes import (
    BATCH,
    LATENCY_CAPTION,
    facts_of_shape,
    latency_words,
)
from taylor_kernels.studies.methods.study import MethodStudy, Search, Trial, Way
from taylor_kernels.studies.training import Schedule, evaluate, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from taylor_kernels.studies.plotting import Plot, Theme
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json

LENET, RESNET = ("LeNet-5", "digits"), ("ResNet", "digits")
FILTER_GSM, MAGNITUDE, DENSE = "FilterGSM", "magnitude, fine-tuned", "dense"
#: Problem -> filters over those that are left; epochs of dense training and of all that follows.
OF_PROBLEM = {
    LENET: {"compression": 4.0, "training": 50, "epochs": 60},
    RESNET: {"compression": 2.0, "training": 15, "epochs": 30},
}
#: Of FilterGSM: passive filters fall by an exponent of 12.6 on both.
DECAY = {LENET: 0.02, RESNET: 0.04}


def by_gsm(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """FilterGSM, and what it keeps."""
    model = _trained(trial, settings)
    optimizer = FilterGSM(
        model,
        trial.data.train.images[:1],
        settings["lr"],
        settings["momentum"],
        settings["weight_decay"],
        settings["compression"],
    )
    train(
        model, trial.data.train, Schedule(settings["epochs"], BATCH, settings["lr"], 0.0),
        generator=trial.generator(), optimizer=optimizer, on_epoch=trial.advance,
    )  # fmt: skip
    before = evaluate(model, trial.data.test)
    optimizer.compact()
    steps = settings["epochs"] * (len(trial.data.train) // BATCH)
    rate = settings["lr"] / 2 * settings["weight_decay"] / (1 - settings["momentum"])
    return facts_of_shape(trial, model) | {"before_the_cut": before, "exponent": rate * steps}


def by_magnitude(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """As many filters stay as with FilterGSM, those of greatest Σ w², and are fine-tuned."""
    model = _trained(trial, settings)
    images = trial.data.train.images[:1]
    FilterGSM(model, images, compression=settings["compression"]).compact()
    _fine_tune(trial, model, settings)
    return facts_of_shape(trial, model)


def dense(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """The trained network, trained on for as long."""
    model = _trained(trial, settings)
    _fine_tune(trial, model, settings)
    return facts_of_shape(trial, model)


def _trained(trial: Trial, settings: Mapping[str, Any]) -> nn.Module:
    return trial.trained(Schedule(settings["training"], BATCH, 0.05, 5e-4))


def _fine_tune(trial: Trial, model: nn.Module, settings: Mapping[str, Any]) -> None:
    train(
        model, trial.data.train, Schedule(settings["epochs"], BATCH, settings["lr"], 5e-4),
        generator=trial.generator(), on_epoch=trial.advance,
    )  # fmt: skip


WAYS = {
    FILTER_GSM: Way(
        by_gsm,
        {"lr": 0.02, "momentum": 0.98},
        {problem: each | {"weight_decay": DECAY[problem]} for problem, each in OF_PROBLEM.items()},
    ),
    MAGNITUDE: Way(by_magnitude, {"lr": 0.02}, OF_PROBLEM),
    DENSE: Way(dense, {"lr": 0.02}, OF_PROBLEM),
}
SEARCHES = [
    Search(
        RESNET,
        FILTER_GSM,
        [
            {"lr": 0.02, "weight_decay": 0.04},
            {"lr": 0.04, "weight_decay": 0.02},
            {"lr": 0.01, "weight_decay": 0.08},
        ],
        seeds=[10],
    )
]


def table(result: Json) -> Table:
    def share(key: str) -> Any:
        return lambda runs: f"{100 * mean(run[key] for run in runs):.1f}%"

    def filters(runs: Sequence[Json]) -> str:
        left, whole = (sum(each[i] for each in runs[0]["filters"]) for i in (1, 2))
        return f"{left} of {whole}"

    return accuracy_table(
        result,
        {
            "filters": filters,
            "parameters": share("params"),
            "FLOPs": share("flops"),
            "latency": partial(latency_words, result),
        },
        "Accuracy on the test split, mean and range over three seeds; FilterGSM without "
        "fine-tuning, all ways with the same epochs in all. Filters: of the first seed, neurons "
        f"among them, and tied ones in each of their layers. {LATENCY_CAPTION}",
    )


def plot(result: Json) -> Plot:
    """What each way keeps of each layer, of the first seed."""
    from taylor_kernels.studies.methods.pages import problems_of, runs_of, ways_of

    def drawn(theme: Theme) -> Drawing:
        from matplotlib.figure import Figure as Drawing

        problems = problems_of(result)
        drawing = Drawing(figsize=(9.2, 2.6 * len(problems)), layout="constrained")
        panels = drawing.subplots(len(problems), squeeze=False)[:, 0]
        for ax, problem in zip(panels, problems, strict=True):
            rows = {way: runs_of(result, way, problem)[0]["filters"] for way in ways_of(result)}
            pruned = [way for way in rows if way != DENSE]
            for number, way in enumerate(pruned):
                places = [place + 0.4 * number - 0.2 for place in range(len(rows[way]))]
                shares = [100 * left / count for _, left, count in rows[way]]
                ax.bar(places, shares, 0.38, label=way, color=theme.series[number])
            names = ["\n".join((*name.split("."), str(n))) for name, _, n in rows[DENSE]]
            ax.set_xticks(range(len(names)), names, fontsize=6.5)
            ax.set_title(", ".join(problem))
            ax.set_ylabel("filters kept, %")
        panels[0].legend()
        return drawing

    return drawn


def summary(result: Json) -> dict[str, str]:
    full, params, flops = (
        dict(means(result, way, key))
        for way, key in ((DENSE, "accuracy"), (FILTER_GSM, "params"), (FILTER_GSM, "flops"))
    )
    accuracies = [
        f"{', '.join(problem)}: {100 * full[problem]:.1f} → {100 * ours:.1f}"
        for problem, ours in means(result, FILTER_GSM, "accuracy")
    ]
    left = [
        f"{problem[0]} {1 / share:.1f}× (FLOPs {1 / flops[problem]:.1f}×)"
        for problem, share in params.items()
    ]
    return {"accuracy": "; ".join(accuracies), "compression": "; ".join(left)}


STUDY = MethodStudy(
    name="filter_gsm",
    method="GSM over filters",
    removes="filters and neurons",
    source="a form of ours",
    file="taylor_kernels/methods/filter_gsm.py",
    problems=list(OF_PROBLEM),
    ways=WAYS,
    table=table,
    plot=plot,
    summary=summary,
    searches=SEARCHES,
)
