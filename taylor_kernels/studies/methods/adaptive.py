"""Adaptive channel and layer pruning beside uniform pruning and beside Taylor scores, at half the
parameters.

Every way begins with the same trained network and has the same epochs: what is not spent on pruning
is spent on fine-tuning. The method is a reconstruction from an abstract, so there is no paper whose
settings these are; they were chosen on one seed of the deeper network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.methods.adaptive import AdaptivePruner
from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.removing.removal import remove
from taylor_kernels.studies.data import minibatches
from taylor_kernels.studies.methods.adaptive_plot import plot
from taylor_kernels.studies.methods.pages import accuracy_table, means
from taylor_kernels.studies.methods.shapes import (
    BATCH,
    LATENCY_CAPTION,
    facts_of_shape,
    latency_words,
)
from taylor_kernels.studies.methods.study import MethodStudy, Trial, Way
from taylor_kernels.studies.training import (
    Schedule,
    count_parameters,
    evaluate,
    sgd,
    train,
)
from taylor_kernels.tracing import Channels, trace

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json

DIGITS, DEEP = ("ResNet", "digits"), ("ResNet, deep", "digits")
#: Epochs of dense training, and of pruning and fine-tuning together.
SETTINGS = {"training": 10, "epochs": 10, "lr": 0.05, "params": 0.5}


def dense(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """The trained network, trained on for as long as the others are pruned and fine-tuned."""
    model = _trained(trial, settings)
    _fine_tune(trial, settings, model, None, settings["epochs"])
    return facts_of_shape(trial, model) | {"epochs": settings["epochs"]}


def adaptive(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """AdaptivePruner until the target is met, then fine-tuning."""
    model = _trained(trial, settings)
    optimizer = sgd(model, settings["lr"], 1e-4)
    pruner = AdaptivePruner(
        model,
        trial.data.train.images[:1],
        optimizer=optimizer,
        params=settings["params"],
        strength=settings["strength"],
        every=settings["every"],
        blocks=settings["blocks"],
    )
    return _pruned(trial, settings, model, optimizer, pruner)


def by_scores(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """`tk.Pruner` until the target is met, then fine-tuning."""
    model = _trained(trial, settings)
    optimizer = sgd(model, settings["lr"], 1e-4)
    pruner = Pruner(
        model,
        trial.data.train.images[:1],
        settings["criterion"],
        params=settings["params"],
        every=settings["every"],
        per_step=0.03,
        blocks=settings["blocks"],
        optimizer=optimizer,
    )
    return _pruned(trial, settings, model, optimizer, pruner)


def uniform(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """The same share of every layer's filters, those of least magnitude, at once."""
    model = _trained(trial, settings)
    optimizer = sgd(model, settings["lr"], 1e-4)
    channels = trace(model, trial.data.train.images[:1])
    most = settings["params"] * count_parameters(model)
    low, high = 0, 100  # percent that go of each layer
    while low < high:
        middle = (low + high) // 2
        smaller = copy.deepcopy(model)
        remove(smaller, channels, _least(smaller, channels, middle / 100))
        low, high = (low, middle) if count_parameters(smaller) <= most else (middle + 1, high)
    remove(model, channels, _least(model, channels, low / 100), optimizer)
    _fine_tune(trial, settings, model, optimizer, settings["epochs"])
    return facts_of_shape(trial, model) | {"epochs": 0}


def _least(model: nn.Module, channels: Channels, share: float) -> list[Tensor]:
    """Per group [U] bool: that share of its units, those of the least Σ w²."""
    modules = dict(model.named_modules())
    found = []
    for group in channels.groups:
        norms = torch.zeros(group.size)
        for slot in group.producers:
            weight = modules[slot.owner].weight
            assert isinstance(weight, Tensor)
            norms += weight.detach().flatten(1).square().sum(1)[slot.index].sum(1)
        gone = torch.zeros(group.size, dtype=torch.bool)
        gone[norms.argsort(stable=True)[: min(int(share * group.size), group.size - 1)]] = True
        found.append(gone)
    return found


def _pruned(
    trial: Trial,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: AdaptivePruner | Pruner,
) -> Json:
    generator, spent = trial.generator(), 0
    while not pruner.done and spent < settings["epochs"]:
        model.train()
        for images, labels in minibatches(trial.data.train, BATCH, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            pruner.step()
            optimizer.step()
        spent += 1
        trial.advance(f"{pruner.cost.params / pruner.whole.params:.0%} of the parameters")
    before = evaluate(model, trial.data.test)
    finished = pruner.done
    pruner.compact()
    pruner.close()
    _fine_tune(trial, settings, model, optimizer, settings["epochs"] - spent)
    gone = [name for record in pruner.history for name in record.blocks]
    return facts_of_shape(trial, model, gone) | {
        "epochs": spent,
        "finished": finished,
        "before fine-tuning": before,
    }


def _trained(trial: Trial, settings: Mapping[str, Any]) -> nn.Module:
    return trial.trained(Schedule(settings["training"], BATCH, 0.05, 1e-4))


def _fine_tune(
    trial: Trial,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    epochs: int,
) -> None:
    train(
        model, trial.data.train, Schedule(epochs, BATCH, settings["lr"] / 2, 1e-4),
        generator=trial.generator(), optimizer=optimizer, on_epoch=trial.advance,
    )  # fmt: skip


def table(result: Json) -> Table:
    def percent(key: str) -> Any:
        return lambda runs: f"{100 * mean(run[key] for run in runs):.0f}%"

    def blocks(runs: Sequence[Json]) -> str:
        return ", ".join(str(len(run["blocks"])) for run in runs)

    return accuracy_table(
        result,
        {
            "parameters": percent("params"),
            "FLOPs": percent("flops"),
            "blocks gone": blocks,
            "latency": partial(latency_words, result),
        },
        "Accuracy on the test split, mean and range over seeds, after fine-tuning; all ways have "
        f"the same epochs in all. Blocks gone: of each seed. {LATENCY_CAPTION}",
    )


def summary(result: Json) -> dict[str, str]:
    full = dict(means(result, "dense", "accuracy"))
    accuracies = [
        f"{', '.join(problem)}: {100 * full[problem]:.1f} → {100 * ours:.1f}"
        for problem, ours in means(result, ADAPTIVE, "accuracy")
    ]
    most = max(share for _, share in means(result, ADAPTIVE, "params"))
    left = f"{100 * most:.0f}%".replace("50%", "half")
    flops = "; ".join(
        f"{problem[0]} {100 * share:.0f}%" for problem, share in means(result, ADAPTIVE, "flops")
    )
    return {
        "accuracy": "; ".join(accuracies),
        "compression": f"{left} of the parameters left; of the FLOPs {flops}",
    }


ADAPTIVE = "adaptive"
WAYS = {
    ADAPTIVE: Way(adaptive, {**SETTINGS, "strength": 0.004, "every": 11, "blocks": True}),
    "adaptive, channels alone": Way(
        adaptive, {**SETTINGS, "strength": 0.004, "every": 11, "blocks": False}
    ),
    "taylor_fo_bn": Way(
        by_scores, {**SETTINGS, "criterion": "taylor_fo_bn", "every": 5, "blocks": False}
    ),
    "taylor_fo_bn, with blocks": Way(
        by_scores, {**SETTINGS, "criterion": "taylor_fo_bn", "every": 5, "blocks": True}
    ),
    "uniform, by magnitude": Way(uniform, SETTINGS),
    "dense": Way(dense, SETTINGS),
}

STUDY = MethodStudy(
    name="adaptive",
    method="Adaptive channels and layers, a reconstruction",
    removes="channels and residual blocks",
    source="from an abstract",
    file="taylor_kernels/methods/adaptive.py",
    problems=[DIGITS, DEEP],
    ways=WAYS,
    table=table,
    plot=plot,
    summary=summary,
)
