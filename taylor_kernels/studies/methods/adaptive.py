"""Adaptive channel and layer pruning beside uniform pruning and beside Taylor scores, at half the
parameters.

Every way begins with the same trained network and has the same epochs: what is not spent on pruning
is spent on fine-tuning. The method is a reconstruction from an abstract, so there is no paper whose
settings these are; they were chosen on one seed of the deeper network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.methods.adaptive import AdaptivePruner
from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.blocks import remove_blocks
from taylor_kernels.pruning.removal import remove
from taylor_kernels.studies.data import minibatches
from taylor_kernels.studies.methods.adaptive_plot import plot
from taylor_kernels.studies.methods.pages import (
    accuracy_table,
    means,
)
from taylor_kernels.studies.methods.problems import DATA, NETWORKS
from taylor_kernels.studies.methods.study import MethodStudy, Trial, Way
from taylor_kernels.studies.training import (
    Schedule,
    count_flops,
    count_parameters,
    evaluate,
    latencies,
    sgd,
    train,
)
from taylor_kernels.tracing import Channels, trace

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json

DIGITS, DEEP = ("ResNet", "digits"), ("ResNet, deep", "digits")
BATCH = 64
#: Epochs of dense training, and of pruning and fine-tuning together.
SETTINGS = {"training": 10, "epochs": 10, "lr": 0.05, "params": 0.5}


def dense(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """The trained network, trained on for as long as the others are pruned and fine-tuned."""
    model = _trained(trial, settings)
    _fine_tune(trial, settings, model, None, settings["epochs"])
    return _facts(trial, settings, model, settings["epochs"])


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
    return _facts(trial, settings, model, 0)


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
    return _facts(trial, settings, model, spent) | {
        "finished": finished,
        "before fine-tuning": before,
        "blocks": [name for record in pruner.history for name in record.blocks],
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


def _facts(trial: Trial, settings: Mapping[str, Any], model: nn.Module, spent: int) -> Json:
    whole = trial.untrained()
    example = trial.data.test.images[:1]
    left = _filters(model)
    return {
        "accuracy": evaluate(model, trial.data.test),
        "params": count_parameters(model) / count_parameters(whole),
        "flops": count_flops(model, example) / count_flops(whole, example),
        "epochs": spent,
        "blocks": [],
        "filters": [[name, left.get(name, 0), count] for name, count in _filters(whole).items()],
    }


def _filters(model: nn.Module) -> dict[str, int]:
    """Convolution -> its filters."""
    return {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def rebuilt(run: Json) -> nn.Module:
    """A network of the shape that a run has come to, untrained: all that its latency depends on."""
    images = DATA[run["data"]](run["seed"]).test.images[:1]
    model = NETWORKS[run["network"]](images.shape[1:])
    blocks, _ = trace(model, images, blocks=True).find_blocks(model)
    remove_blocks(model, [block for block in blocks if block.name in run["blocks"]])
    channels = trace(model, images)
    left = {name: kept for name, kept, _ in run["filters"]}
    dead = [torch.arange(group.size) >= left[group.producers[0].owner] for group in channels.groups]
    remove(model, channels, dead)
    return model


def milliseconds(runs: Sequence[Json], repeats: int = 25) -> list[float]:
    """Of each run's network the median time of a batch, in turns with all others' in one process.

    The runs are of one problem.
    """
    images = DATA[runs[0]["data"]](0).test.images[:BATCH]
    models = {str(number): rebuilt(run) for number, run in enumerate(runs)}
    return [
        quartiles["median"] for quartiles in latencies(models, images, repeats=repeats).values()
    ]


def table(result: Json) -> Table:
    def percent(key: str) -> Any:
        return lambda runs: f"{100 * mean(run[key] for run in runs):.0f}%"

    def blocks(runs: Sequence[Json]) -> str:
        return ", ".join(str(len(run["blocks"])) for run in runs)

    speed = result.get("speed", {}).get("relative", {})

    def latency(runs: Sequence[Json]) -> str:
        of_problem = speed.get(", ".join((runs[0]["network"], runs[0]["data"])), {})
        found = of_problem.get(runs[0]["way"])
        return f"{mean(found):.2f} ({min(found):.2f}–{max(found):.2f})" if found else "–"

    return accuracy_table(
        result,
        {
            "parameters": percent("params"),
            "FLOPs": percent("flops"),
            "blocks gone": blocks,
            "latency": latency,
        },
        "Accuracy on the test split, mean and range over seeds, after fine-tuning; all ways have "
        "the same epochs in all. Blocks gone: of each seed. Latency: of a batch of 64 on one CPU "
        "thread, over the mean of the dense networks in the same process; mean and range of three "
        "seeds. Dense networks are all of one shape, so that their range is what the machine adds.",
    )


def speed_words(relative: Mapping[str, Mapping[str, Sequence[float]]], way: str) -> str:
    """How much faster a batch is, where that is more than dense networks of one shape differ by.

    Args:
        relative: problem -> way -> latency of each seed's network over the dense ones' mean.
    """
    # Noise is the machine's and not a network's, so that the noisiest of all is asked.
    noise = max(max(each["dense"]) - min(each["dense"]) for each in relative.values())
    gains = {name: mean(each[way]) for name, each in relative.items()}
    said = [f"{1 / left:.2f}× ({name})" for name, left in gains.items() if 1 - left > noise]
    return f"a batch faster by {', '.join(said)}" if said else "–"


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
