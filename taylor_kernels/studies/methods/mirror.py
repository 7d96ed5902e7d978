"""Mirror-descent quantization beside its baselines, all of them options of one object.

Every way has the same network, order of minibatches, epochs and optimizer (Adam, whose rate falls
in steps); they differ in `method`, and in the learning rate. Settings were chosen on seeds that are
not reported. docs/mirror-descent.md lists what differs from the paper.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from taylor_kernels.methods import MirrorDescent, parameter_groups
from taylor_kernels.studies.data import minibatches
from taylor_kernels.studies.methods.mirror_plots import plot
from taylor_kernels.studies.methods.pages import (
    accuracy_table,
    means,
    percent,
    problems_of,
    runs_of,
    ways_of,
)
from taylor_kernels.studies.methods.problems import Data
from taylor_kernels.studies.methods.study import MethodStudy, Search, Trial, Way
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.results import Json
from taylor_kernels.studies.training import evaluate

DIGITS = ("LeNet-600-200 with norms", "digits")
SIGNALS = ("LeNet-5, 2× wide, with norms", "MNIST-1D")
BATCH = 64
#: Problem -> epochs of every way, and whether the first layer is quantized. There are no more than
#: 32 filters of 5 weights of ±1, which cost 8 points of accuracy.
OF_PROBLEM = {
    DIGITS: {"epochs": 60, "first": True},
    SIGNALS: {"epochs": 30, "first": False},
}
#: β grows from 1 to this, in so many steps or as there are iterations: as in the paper on CIFAR-10.
BETA_END, BETA_STEPS = 2e4, 500


def float_network(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """The network as it is, by the same Adam."""
    model = trial.untrained()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    _train(trial, model, optimizer, settings)
    sizes = [tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()]
    return {"accuracy": accuracy(model, trial.data), "bytes": sum(sizes)}


def mirror_descent(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """One method of MirrorDescent: rounded accuracy, soft accuracy, and how the weights moved."""
    model = trial.untrained()
    steps = settings["epochs"] * (len(trial.data.train) // BATCH)
    interval = max(1, steps // BETA_STEPS)
    groups = parameter_groups(
        model,
        first=settings["first"],
        method=settings["method"],
        levels=settings["levels"],
        scale=settings["scale"],
        start=settings["start"],
        beta_scale=settings["beta_end"] ** (interval / steps),
        beta_interval=interval,
    )
    optimizer = MirrorDescent(groups, lr=settings["lr"])
    followed = Followed(optimizer)
    _train(trial, model, optimizer, settings, followed.epoch)
    report = optimizer.quantize(partial(accuracy, model, trial.data))
    with tempfile.TemporaryDirectory() as folder:
        size = optimizer.export(model, Path(folder) / "model.safetensors")
    return {
        "accuracy": report.hard,
        "soft": report.soft,
        "distance": report.distance,
        "zeros": report.zeros / report.weights,
        "bytes": size,
        "saturated": followed.saturated,
        "turned": followed.turned,
    }


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """On the test split, norms with the statistics that the training split has under the weights as
    they are: those of training are of weights that still turned."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    for images in data.train.images.split(256):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return evaluate(model, data.test)


class Followed:
    """How many quantized weights are at a level exactly after each epoch, and how many turn until
    the next of those that are.

    The levels are those of binary weights, ± the scale that the optimizer has for a parameter. A
    weight turns that has the other sign an epoch later.
    """

    def __init__(self, optimizer: MirrorDescent) -> None:
        self._weights = [
            (param, state["scale"]) for param, state in optimizer.state.items() if "value" in state
        ]
        self._before = self._now()
        self.saturated: list[float] = []
        self.turned: list[float] = []

    def _now(self) -> Tensor:
        """Every weight over its scale: ±1, where it is at a level, exactly."""
        return torch.cat([(param.detach() / scale).flatten() for param, scale in self._weights])

    def epoch(self) -> None:
        now, before = self._now(), self._before
        at_level = before.abs() == 1
        turns = int(((now < 0) != (before < 0))[at_level].sum())
        self.turned.append(turns / max(int(at_level.sum()), 1))
        self.saturated.append(float((now.abs() == 1).float().mean()))
        self._before = now


def _train(
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """The rate falls to 0.3 of itself after each 30% of the steps, as in the paper.

    It must not fall faster than β grows: where β·η reaches 0, weights come to rest between levels.
    """
    epochs, data, generator = settings["epochs"], trial.data.train, trial.generator()
    steps = epochs * (len(data) // BATCH)
    milestones = [round(part * steps) for part in (0.3, 0.6, 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.3)
    model.train()
    for _ in range(epochs):
        for images, labels in minibatches(data, BATCH, generator):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch()
        trial.advance(f"loss {loss.item():.3f}")


def _way(
    method: str, lr: float = 0.01, levels: str = "binary", start: str = "weights", **on_signals: Any
) -> Way:
    """`on_signals`: what is otherwise on MNIST-1D."""
    settings = {"method": method, "levels": levels, "lr": lr, "beta_end": BETA_END, "start": start}
    of_problem = OF_PROBLEM | {SIGNALS: OF_PROBLEM[SIGNALS] | on_signals}
    return Way(mirror_descent, settings | {"scale": "layer"}, of_problem)


FLOAT = "float network"
WAYS = {
    "md-tanh-s": _way("md-tanh-s", beta_end=500.0),
    "md-softmax-s": _way("md-softmax-s", beta_end=500.0),
    "md-tanh (plain)": _way("md-tanh"),
    "gd-tanh": _way("gd-tanh"),
    "pmf": _way("pmf"),
    "binaryconnect": _way("binaryconnect", 0.003),
    "md-tanh-s, ternary": _way("md-tanh-s", levels="ternary", start="spread"),
    FLOAT: Way(float_network, {"lr": 0.003}, OF_PROBLEM),
}


#: Six settings for each of the two.
_RATES = [{"lr": lr} for lr in (0.001, 0.002, 0.003, 0.005, 0.01)]
_SPREAD = {"lr": 0.003, "start": "spread"}
_RATES_AND_ENDS = [
    {"lr": lr, "beta_end": end}
    for lr, end in (
        (0.001, 500.0),
        (0.003, 500.0),
        (0.003, 2e4),
        (0.01, 500.0),
        (0.01, 2e4),
        (0.01, 2e3),
    )
]
SEARCHES = [
    Search(SIGNALS, "md-tanh-s", _RATES_AND_ENDS),
    Search(SIGNALS, "binaryconnect", [*_RATES, _SPREAD]),
]


def table(result: Json) -> Table:
    def soft(runs: Sequence[Json]) -> str:
        return percent([run["soft"] for run in runs]) if "soft" in runs[0] else "–"

    return accuracy_table(
        result,
        {
            "soft, %": soft,
            "file, KiB": lambda runs: f"{mean(run['bytes'] for run in runs) / 1024:.0f}",
        },
        "Accuracy of the rounded weights on the test split, mean and range over three seeds; soft: "
        "before rounding. The file is the whole model's, biases and statistics of norms included."
        + gaps(result),
    )


def gaps(result: Json) -> str:
    """What some rows lack that others have, in sentences behind a space."""
    said, watched, mixed = [], [], False
    for problem in problems_of(result):
        runs = {way: runs_of(result, way, problem) for way in ways_of(result)}
        where = ", ".join(problem)
        if missing := [way for way, found in runs.items() if not found]:
            said.append(f" Not run on {where}: {', '.join(missing)}.")
        quantized = {way: found for way, found in runs.items() if found and way != FLOAT}
        ways = [way for way, found in quantized.items() if "saturated" in found[0]]
        mixed |= len(ways) < len(quantized)
        if ways:
            watched.append(f"{', '.join(ways)} on {where}")
    if mixed:
        said.append(
            " Rows are of different states of the code, under the date of the last: the share of "
            f"weights at a level, which the plot has, was kept of {'; '.join(watched) or 'none'}."
        )
    return "".join(said)


def summary(result: Json) -> dict[str, str]:
    lost = [
        f"{', '.join(problem)}: {100 * full:.1f} → {100 * ours:.1f}"
        for (problem, ours), (_, full) in zip(
            means(result, "md-tanh-s", "accuracy"), means(result, FLOAT, "accuracy"), strict=True
        )
    ]
    sizes = [
        full / ours
        for (_, ours), (_, full) in zip(
            means(result, "md-tanh-s", "bytes"), means(result, FLOAT, "bytes"), strict=True
        )
    ]
    return {"accuracy": "; ".join(lost), "compression": f"{min(sizes):.0f}–{max(sizes):.0f}×"}


STUDY = MethodStudy(
    name="mirror",
    method="Mirror descent, binary",
    removes="31 of 32 bits of a weight",
    source="Ajanthan et al. 2021",
    file="taylor_kernels/methods/mirror_descent.py",
    problems=[DIGITS, SIGNALS],
    ways=WAYS,
    table=table,
    plot=plot,
    summary=summary,
    searches=SEARCHES,
)
