"""SPP beside pruning by the L1 norm of columns, at once and step by step, at the same ratio.

Every way begins with the same trained network and has the same epochs: what is not spent on pruning
is spent on retraining. A replica in minutes: docs/spp.md lists what differs from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.methods import SPP, lower_columns
from taylor_kernels.methods.spp_groups import Switched, column_layers
from taylor_kernels.studies.data import minibatches
from taylor_kernels.studies.methods.pages import accuracy_table, means, percent
from taylor_kernels.studies.methods.spp_plot import plot
from taylor_kernels.studies.methods.study import MethodStudy, Trial, Way
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.results import Json
from taylor_kernels.studies.training import Schedule, count_flops, evaluate, sgd, train

DIGITS, SIGNALS = ("ResNet", "digits"), ("LeNet-5", "MNIST-1D")
BATCH = 64
#: Epochs of dense training, of pruning and of retraining.
EPOCHS = {DIGITS: (15, 20, 10), SIGNALS: (20, 12, 10)}
#: Columns of which the plot shows the probability.
SHOWN = 12


def dense(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """The trained network, trained on for as long as the others are pruned and retrained."""
    model = _trained(trial, settings)
    _retrain(trial, model, None, settings["pruning"] + settings["retraining"])
    return {"accuracy": evaluate(model, trial.data.test), "macs": 1.0}


def spp(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """SPP until every layer has reached its ratio, then retraining."""
    model = _trained(trial, settings)
    before = _macs(trial, model)
    optimizer = sgd(model, settings["lr"], 1e-4)
    per_epoch = len(trial.data.train) // BATCH
    updates = settings["updates"]
    pruner = SPP(
        model,
        settings["ratio"],
        every=max(1, settings["pruning"] * per_epoch // updates),
        step=settings["step"],
        seed=trial.seed,
    )
    generator = trial.generator()
    shown, recovered, midway = [], [], {}
    watched = max(pruner.probabilities(), key=lambda name: pruner.probabilities()[name].numel())
    spent = 0
    while not pruner.done and spent < settings["pruning"]:
        model.train()
        for images, labels in minibatches(trial.data.train, BATCH, generator):
            optimizer.zero_grad()
            with pruner.masked():
                F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            shown.append(pruner.probabilities()[watched])
            recovered.append(pruner.recoveries)
        spent += 1
        if spent == settings["pruning"] // 5:
            midway = _seen(pruner, model, trial)
        trial.advance(f"{pruner.recoveries} recoveries")
    finished = pruner.done
    shares = {name: gone.float().mean().item() for name, gone in pruner.gone().items()}
    _retrain(trial, model, optimizer, settings["pruning"] + settings["retraining"] - spent)
    pruner.close()
    thin = max(1, len(shown) // 120)
    return {
        "accuracy": evaluate(model, trial.data.test),
        "macs": _macs(trial, model, pruned=True) / before,
        "finished": finished,
        "epochs": spent,
        "recoveries": recovered[-1],
        "midway": midway,
        "gone": mean(shares.values()),
        "watched": watched,
        "iterations": list(range(0, len(shown), thin)),
        "shown": _chosen(torch.stack(shown))[::thin].tolist(),
        "recovered": recovered[::thin],
    }


def by_norm(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """Columns of the lowest L1 norm go, in `rounds` equal steps over the pruning epochs."""
    model = _trained(trial, settings)
    before = _macs(trial, model)
    optimizer = sgd(model, settings["lr"], 1e-4)
    layers = column_layers(model, None)
    rounds, spent = settings["rounds"], 0
    for number in range(1, rounds + 1):
        share = settings["ratio"] * number / rounds
        held = [_cut(each, share) for each in layers]
        hook = optimizer.register_step_post_hook(partial(_hold, layers, held))
        if number < rounds:
            epochs = settings["pruning"] // rounds
            _retrain(trial, model, optimizer, epochs, settings["lr"])
            spent += epochs
            hook.remove()
    _retrain(trial, model, optimizer, settings["pruning"] + settings["retraining"] - spent)
    return {
        "accuracy": evaluate(model, trial.data.test),
        "macs": _macs(trial, model, pruned=True) / before,
    }


def _cut(each: Switched, share: float) -> Tensor:
    """Zero the columns of the lowest norm: [n] of 0 for these, 1 for the others."""
    kept = torch.ones(each.count)
    kept[each.scores().argsort(stable=True)[: math.ceil(share * each.count)]] = 0
    each.scale(kept)
    return kept


def _hold(layers: Sequence[Switched], held: Sequence[Tensor], *_: object) -> None:
    for each, kept in zip(layers, held, strict=True):
        each.scale(kept)


def _trained(trial: Trial, settings: Mapping[str, Any]) -> nn.Module:
    return trial.trained(Schedule(settings["training"], BATCH, 0.05, 1e-4))


def _retrain(
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    epochs: int,
    lr: float = 0.02,
) -> None:
    train(
        model, trial.data.train, Schedule(epochs, BATCH, lr, 1e-4), generator=trial.generator(),
        optimizer=optimizer, on_epoch=trial.advance,
    )  # fmt: skip


def _chosen(rows: Tensor) -> Tensor:
    """Of the probabilities of all columns, [T, n], those of `SHOWN` columns, [T, SHOWN]: the ones
    that recovered from the highest probability, half of them at most, and others at even steps.

    Where a layer has reached its ratio all probabilities below 1 return to 0, which is no recovery.
    """
    gone = (rows == 1).sum(1)
    moving = rows[gone < gone[-1]]
    peak = moving.cummax(0).values
    recovered = (peak * ((moving == 0) & (peak > 0))).amax(0)
    most = recovered.argsort(descending=True, stable=True)[: SHOWN // 2]
    most = most[recovered[most] > 0]
    even = torch.arange(rows.size(1))[:: max(1, rows.size(1) // (SHOWN - most.numel()))]
    columns = dict.fromkeys([*most.tolist(), *even.tolist()])
    return rows[:, list(columns)[:SHOWN]]


def _seen(pruner: SPP, model: nn.Module, trial: Trial) -> dict[str, float]:
    """Accuracy in mid-run under each kind of mask."""
    found = {}
    for mask in ("drawn", "expected", "thresholded"):
        with pruner.evaluated(mask):
            found[mask] = evaluate(model, trial.data.test)
    return found


def _macs(trial: Trial, model: nn.Module, *, pruned: bool = False) -> int:
    """FLOPs of one example; without the columns of zeros if `pruned`."""
    if pruned:
        lower_columns(model)
    return count_flops(model, trial.data.test.images[:1])


def _way(run: Any, **settings: Any) -> Way:
    names = ("training", "pruning", "retraining")
    of_problem = {
        problem: dict(zip(names, epochs, strict=True)) for problem, epochs in EPOCHS.items()
    }
    return Way(run, {"lr": 0.01} | settings, of_problem)


WAYS = {
    "SPP, 2×": _way(spp, ratio=0.5, step=0.1, updates=200),
    "SPP, 4×": _way(spp, ratio=0.75, step=0.1, updates=200),
    "L1, iterative, 2×": _way(by_norm, ratio=0.5, rounds=5),
    "L1, iterative, 4×": _way(by_norm, ratio=0.75, rounds=5),
    "L1, one shot, 2×": _way(by_norm, ratio=0.5, rounds=1),
    "L1, one shot, 4×": _way(by_norm, ratio=0.75, rounds=1),
    "dense": _way(dense),
}


def table(result: Json) -> Table:
    def recoveries(runs: Sequence[Json]) -> str:
        return f"{mean(run['recoveries'] for run in runs):.0f}" if "recoveries" in runs[0] else "–"

    def midway(runs: Sequence[Json]) -> str:
        seen = runs[0].get("midway") or {}
        return " / ".join(percent([value]) for value in seen.values()) or "–"

    columns = {
        "FLOPs": lambda runs: f"{100 * mean(run['macs'] for run in runs):.0f}%",
        "recoveries": recoveries,
    }
    caption = (
        "Accuracy on the test split, mean and range over three seeds; all ways have the same "
        "epochs in all."
    )
    if any(run.get("midway") for run in result["runs"] if run["seed"] == 0):
        columns["midway: drawn / expected / thresholded"] = midway
        caption += (
            " Midway: of seed 0, behind a fifth of the epochs of pruning, under each kind of mask."
        )
    return accuracy_table(result, columns, caption)


def speed_table(result: Json) -> Table:
    """How fast each layer of bench/speed_spp.py is with fewer columns or channels."""
    layers = result.get("speed", {"layers": []})["layers"]
    kinds = ("columns 2×", "columns 4×", "channels 2×", "channels 4×")
    rows = [
        [f"{each['width']} channels, {each['side']}×{each['side']}"]
        + [f"{each['milliseconds']['dense']:.1f}"]
        + [f"{each['milliseconds']['dense'] / each['milliseconds'][kind]:.2f}×" for kind in kinds]
        for each in layers
    ]
    machine = result.get("speed", {}).get("machine", {})
    caption = (
        "3×3 convolutions of a batch of 4, and how many times as fast they are with fewer columns "
        "(`lower_columns`) or fewer input channels; below 1 is slower. "
        f"{machine.get('threads')} threads of {machine.get('cpu')}, medians in turns."
    )
    return Table(["layer", "dense, ms", *kinds], rows, caption)


def summary(result: Json) -> dict[str, str]:
    full, half, quarter = (
        dict(means(result, way, "accuracy")) for way in ("dense", "SPP, 2×", "SPP, 4×")
    )
    accuracies = []
    for problem in full:
        before, *after = (100 * each[problem] for each in (full, half, quarter))
        words = ", ".join(f"{ours:.1f}" for ours in after)
        accuracies.append(f"{', '.join(problem)}: {before:.1f} → {words}")
    flops = [dict(means(result, way, "macs")) for way in ("SPP, 2×", "SPP, 4×")]
    left = "; ".join(
        f"{problem[0]} {', '.join(f'{100 * each[problem]:.0f}%' for each in flops)}"
        for problem in full
    )
    return {
        "accuracy": "; ".join(accuracies),
        "compression": f"1/2, 1/4 of the columns left; of the FLOPs {left}",
    }


STUDY = MethodStudy(
    name="spp",
    method="SPP",
    removes="columns of lowered weights, or filters",
    source="Wang et al. 2018",
    file="taylor_kernels/methods/spp.py",
    problems=[DIGITS, SIGNALS],
    ways=WAYS,
    table=table,
    plot=plot,
    summary=summary,
    more={"speed": speed_table},
)
