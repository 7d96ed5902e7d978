"""GSM on small networks, beside cutting a trained network by magnitude to as many weights.

The paper's phases: a network is trained, GSM goes on from it, and what is left is cut by magnitude
without fine-tuning. These replicas take minutes. What differs from the paper: other data; 16,800
or 4,200 minibatches of 64 rather than 65,600 of 256, a cosine in place of a constant rate, no
warm-up, and a decay of 2e-3 rather than 5e-4, for three of four problems with twice the rate, so
that passive weights decay by an exponent of 8.4 at least. The momentum is the paper's. Rate, decay
and epochs were chosen on seeds 10 to 15, which are not reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taylor_kernels.methods.gsm import GSM
from taylor_kernels.ops.global_threshold import global_threshold, greatest_masks
from taylor_kernels.studies.methods.study import MethodStudy, Search, Trial, Way, schedule_facts
from taylor_kernels.studies.training import Schedule, evaluate, sgd, train

if TYPE_CHECKING:
    from taylor_kernels.studies.plotting import Plot, Theme
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.results import Json

#: Powers of ten between which |w| is counted, in bins of a fifth of one.
POWERS, BINS = (-9, 1), 50
LENET_300, LENET_5 = "LeNet-300-100", "LeNet-5"
PROBLEMS = [(net, data) for net in (LENET_300, LENET_5) for data in ("digits", "MNIST-1D")]
#: Minibatches per epoch differ: 21 of the digits, 62 of MNIST-1D.
EPOCHS = {
    (LENET_300, "digits"): 800,
    (LENET_5, "digits"): 200,
    (LENET_300, "MNIST-1D"): 68,
    (LENET_5, "MNIST-1D"): 68,
}
RATE = dict.fromkeys(PROBLEMS, 0.02) | {(LENET_300, "digits"): 0.01}
DENSE_EPOCHS = {"digits": 50, "MNIST-1D": 34}
COMPRESSION = {"digits": 60.0, "MNIST-1D": 20.0}
GSM_SETTINGS = {"momentum": 0.99, "weight_decay": 2e-3, "batch_size": 64}


#: From what was taken first to the paper's decay and length: passive weights fall by the same
#: exponent of 16.8, active ones are pulled less.
SEARCHES = [
    Search(
        (LENET_300, "digits"),
        "GSM",
        [
            {"epochs": 800, "weight_decay": 2e-3},
            {"epochs": 1600, "weight_decay": 1e-3},
            {"epochs": 3200, "weight_decay": 5e-4},
        ],
        seeds=(10, 11),
    )
]


def of_each_problem() -> dict[tuple[str, str], dict[str, Any]]:
    """Settings that differ between problems."""
    return {
        problem: {
            "compression": COMPRESSION[problem[1]],
            "epochs": EPOCHS[problem],
            "rate": RATE[problem],
            "dense": schedule_facts(Schedule(DENSE_EPOCHS[problem[1]], 64, 0.05, 5e-4)),
        }
        for problem in PROBLEMS
    }


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() in (2, 4)]


def magnitudes(model: nn.Module) -> list[int]:
    """How many |w| lie in each bin of `POWERS`; what is smaller counts in the first."""
    values = torch.cat([w.detach().abs().flatten() for w in weights_of(model)])
    powers = values.clamp_min(10.0 ** POWERS[0]).log10().clamp_max(POWERS[1])
    return [int(n) for n in torch.histc(powers, BINS, *POWERS)]


def facts(model: nn.Module, trial: Trial) -> Json:
    left = sum(int(w.count_nonzero()) for w in weights_of(model))
    total = sum(w.numel() for w in weights_of(model))
    return {"accuracy": evaluate(model, trial.data.test), "left": left, "weights": total}


def by_gsm(trial: Trial, settings: Mapping[str, Any]) -> Json:
    model = trial.trained(Schedule(**settings["dense"]))
    lr = settings["rate"]
    numbers = (settings[key] for key in ("momentum", "weight_decay", "compression"))
    optimizer = GSM(model.parameters(), lr, *numbers)
    shown, epochs = [magnitudes(model)], settings["epochs"]

    def on_epoch(note: str) -> None:
        trial.advance(note)
        shown.append(magnitudes(model))

    schedule = Schedule(epochs, settings["batch_size"], lr, 0.0)
    generator = trial.generator()
    train(
        model, trial.data.train, schedule,
        generator=generator, optimizer=optimizer, on_epoch=on_epoch,
    )  # fmt: skip
    before = evaluate(model, trial.data.test)
    optimizer.finish()
    steps = epochs * (len(trial.data.train) // settings["batch_size"])
    rate = lr / 2 * settings["weight_decay"] / (1 - settings["momentum"])
    kept = [shown[epochs * quarter // 4] for quarter in range(5)]
    return facts(model, trial) | {
        "before_the_cut": before,
        "steps": steps,
        "exponent": rate * steps,
        "magnitudes": kept if trial.seed == 0 else [],
    }


def dense(trial: Trial, settings: Mapping[str, Any]) -> Json:
    return facts(trial.trained(Schedule(**settings["dense"])), trial)


@torch.no_grad()
def cut(model: nn.Module, compression: float) -> list[Tensor]:
    """Set all but the weights of greatest magnitude to zero; masks of those that are left."""
    weights = weights_of(model)
    total = sum(w.numel() for w in weights)
    masks = greatest_masks(weights, global_threshold(weights, int(total / compression)))
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask)
    return masks


def by_magnitude(trial: Trial, settings: Mapping[str, Any]) -> Json:
    """In one shot, and fine-tuned with what is cut held at zero if there are epochs for it."""
    model = trial.trained(Schedule(**settings["dense"]))
    masks = cut(model, settings["compression"])
    if settings["fine_tuned"]:
        optimizer = sgd(model, settings["lr"], settings["weight_decay"])

        def hold(*_: object) -> None:
            with torch.no_grad():
                for weight, mask in zip(weights_of(model), masks, strict=True):
                    weight.mul_(mask)

        optimizer.register_step_post_hook(hold)
        schedule = Schedule(settings["epochs"], 64, settings["lr"], settings["weight_decay"])
        train(
            model, trial.data.train, schedule,
            generator=trial.generator(), optimizer=optimizer, on_epoch=trial.advance,
        )  # fmt: skip
    return facts(model, trial)


def table(result: Json) -> Table:
    from taylor_kernels.studies.methods.pages import accuracy_table

    caption = (
        "Means and ranges of three seeds, without fine-tuning where none is named; each network is "
        "cut to the same number of weights. `left`: weights of linear layers and convolutions."
    )
    more = {"left": lambda runs: f"{runs[0]['left']:,} of {runs[0]['weights']:,}"}
    return accuracy_table(result, more, caption)


def speed_table(result: Json) -> Table:
    """What a step of ResNet-50's parameters costs, as bench/speed_gsm.py has measured it."""
    from taylor_kernels.studies.report import Table

    speed = result.get("speed", {})
    machine, times = speed.get("machine", {}), speed.get("milliseconds", {})
    rows = []
    for name, took in times.items():
        peak = speed["peak_mib"][name]
        memory = "–" if peak is None else f"{peak:.1f}"
        rows.append([name, f"{took:.0f}", f"{took / times['SGD, foreach']:.2f}×", memory])
    caption = (
        f"{speed.get('elements', 0):,} parameters, compression 4; {machine.get('threads')} threads "
        f"of {machine.get('cpu')}, medians in turns. Memory: the most that a step has beside "
        "weights, gradients and momentum."
    )
    return Table(["step", "ms", "of SGD's time", "memory, MiB"], rows, caption)


def summary(result: Json) -> dict[str, str]:
    from taylor_kernels.studies.methods.pages import problems_of, runs_of

    words, compression = [], []
    for problem in problems_of(result):
        ours, plain = (runs_of(result, way, problem) for way in ("GSM", "dense"))
        accuracies = [100 * mean(run["accuracy"] for run in runs) for runs in (plain, ours)]
        words.append(f"{problem[0]}, {problem[1]}: {accuracies[0]:.1f} → {accuracies[1]:.1f}")
        compression.append(f"{ours[0]['settings']['compression']:.0f}×")
    return {"accuracy": "; ".join(words), "compression": ", ".join(compression)}


def two_populations(result: Json) -> Plot:
    """|w| over training, a panel per problem: what GSM reaches stays, the rest falls away."""
    import numpy as np
    from matplotlib.figure import Figure as Drawing

    from taylor_kernels.studies.methods.pages import problems_of, runs_of

    shown = {
        problem: runs[0]["magnitudes"]
        for problem in problems_of(result)
        if (runs := runs_of(result, "GSM", problem)) and runs[0]["magnitudes"]
    }
    edges = np.linspace(*POWERS, BINS + 1)

    def plot(theme: Theme) -> Drawing:
        drawing = Drawing(figsize=(9.2, 2.6 * max((len(shown) + 1) // 2, 1)), layout="constrained")
        panels = drawing.subplots(max((len(shown) + 1) // 2, 1), 2, squeeze=False).flat
        for panel, (problem, moments) in zip(panels, shown.items(), strict=False):
            for quarter, counts in enumerate(moments):
                shares = np.array(counts) / sum(counts)
                panel.stairs(
                    shares, edges, color=theme.series[quarter], label=f"{25 * quarter}%", lw=1.3
                )
            panel.set_yscale("log")
            panel.set_title(", ".join(problem))
            panel.set_xlabel("log₁₀ |w|")
            panel.set_ylabel("share of weights")
        lines = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(*lines, title="of the steps", loc="outside lower center", ncols=5)
        return drawing

    return plot


STUDY = MethodStudy(
    name="gsm",
    method="GSM",
    removes="weights",
    source="Ding et al., NeurIPS 2019",
    file="taylor_kernels/methods/gsm.py",
    problems=PROBLEMS,
    ways={
        "GSM": Way(by_gsm, GSM_SETTINGS, of_each_problem()),
        "dense": Way(dense, {}, of_each_problem()),
        "magnitude": Way(by_magnitude, {"fine_tuned": False}, of_each_problem()),
        "magnitude, fine-tuned": Way(
            by_magnitude, {"fine_tuned": True, "lr": 0.02, "weight_decay": 5e-4}, of_each_problem()
        ),
    },
    table=table,
    plot=two_populations,
    summary=summary,
    more={"speed": speed_table},
    searches=SEARCHES,
)
