"""What the demo shows of its result: the table, the plots and the report around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.pruning import plots
from taylor_kernels.studies.report import Figure, Report, Section, Table, Text
from taylor_kernels.studies.results import Json, footer, threads_in_words

_COLUMNS = ("network", "parameters", "FLOPs, M", "accuracy, %", "as pruned, %")


def result_table(result: Json) -> Table:
    """The dense network and what each criterion left of it: size, accuracy and time."""
    batch = result["settings"]["recipe"]["latency_batch"]
    dense, latency = result["dense"], result["latency_ms"]
    rows = [["dense", *_row(dense, dense, latency["dense"], latency["dense"])]]
    for name in result["settings"]["criteria"]:
        rows.append([name, *_row(_runs(result, name), dense, latency[name], latency["dense"])])
    return Table(
        [*_COLUMNS, f"ms per {batch} images"],
        rows,
        caption=_table_caption(result),
        emphasis=(1,),
    )


def build_report(result: Json, folder: Path) -> Report:
    """The report of a result; writes its plots to `folder` as PNG."""
    kept = f"{result['settings']['flops']:.0%}"
    return Report(
        title=f"A network pruned to {kept} of its FLOPs",
        lead=_lead(result),
        sections=[
            Section("Before and after", [result_table(result)]),
            Section("Accuracy against FLOPs", [_curves(result, folder)]),
            Section("Where the filters went", [_widths(result, folder)]),
            *_importance_section(result, folder),
            Section("What these numbers show, and what not", [Text(_caveats(result))]),
            Section("How it was done", [Text(_method(result)), _settings_table(result)]),
        ],
        footer=footer(result),
    )


def _lead(result: Json) -> str:
    first, *others = result["settings"]["criteria"]
    runs, dense, latency = _runs(result, first), result["dense"], result["latency_ms"]
    flops, parameters = (_share(runs, dense, key) for key in ("flops", "parameters"))
    time = latency[first]["median"] / latency["dense"]["median"]
    lead = (
        f"A small residual network on real scanned digits. `{first}` leaves {flops:.0%} of its "
        f"FLOPs and {parameters:.0%} of its parameters; test accuracy goes from {_percent(dense)}% "
        f"to **{_percent(runs)}%**, and a batch takes {time:.2f}× the time."
    )
    if others:
        ends = [f"`{name}` ends at {_percent(_runs(result, name))}%" for name in others]
        lead += f" Under the same schedule {' and '.join(ends)}."
        pruned = [
            f"{_percent(_runs(result, name), 'accuracy_before_finetuning')}%"
            for name in (first, *others)
        ]
        lead += f" Before fine-tuning they stood at {', '.join(pruned)}, in this order."
    return f"{lead} Differences of about {_standard_error(result):.1f} points are noise."


def _row(runs: Sequence[Json], dense: Sequence[Json], ms: Json, dense_ms: Json) -> list[str]:
    of_dense = runs is not dense
    parameters, flops = (_mean(run[key] for run in runs) for key in ("parameters", "flops"))
    row = [f"{parameters:,.0f}", f"{flops / 1e6:.2f}", _spread(runs), "", f"{ms['median']:.2f}"]
    if of_dense:
        row[0] += f" ({_share(runs, dense, 'parameters'):.0%})"
        row[1] += f" ({_share(runs, dense, 'flops'):.0%})"
        row[3] = _percent(runs, "accuracy_before_finetuning")
        row[4] += f" ({ms['median'] / dense_ms['median']:.2f}×)"
    return row


def _spread(runs: Sequence[Json]) -> str:
    values = [100 * run["accuracy"] for run in runs]
    extent = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
    return f"{_mean(values):.1f}{extent}"


def _table_caption(result: Json) -> str:
    seeds = result["settings"]["seeds"]
    recipe, machine = result["settings"]["recipe"], result["machine"]
    where = machine["gpu"] or f"CPU ({machine['cpu']}), {threads_in_words(result)}"
    over = f"mean and range of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return (
        f"Accuracy: on {result['data']['test_images']} test images, {over}; as pruned: before "
        "fine-tuning. FLOPs: of one image, two per multiply-add. Time: median of "
        f"{recipe['latency_repeats']} interleaved forward passes, {where}, networks of seed "
        f"{seeds[0]}."
    )


def _curves(result: Json, folder: Path) -> Figure:
    series = [
        plots.Series(
            name,
            [
                [(100 * step["flops"], 100 * step["accuracy"]) for step in run["steps"]]
                for run in _runs(result, name)
            ],
            [100 * run["accuracy"] for run in _runs(result, name)],
        )
        for name in result["settings"]["criteria"]
    ]
    dense = [100 * one["accuracy"] for one in result["dense"]]
    seeds = len(dense)
    lines = "Thick lines: mean; thin lines: each seed. " if seeds > 1 else ""
    return draw(
        plots.accuracy_against_flops(series, dense),
        folder / "accuracy_vs_flops.png",
        alt="Test accuracy against the FLOPs kept, a line per criterion, and after fine-tuning.",
        caption=f"{lines}Left: on the test images at the moment filters were switched off, "
        f"{result['settings']['recipe']['every']} minibatches of training after the step before. "
        "Right: the final networks, a mark per seed, a bar at the mean.",
    )


def _widths(result: Json, folder: Path) -> Figure:
    runs = [_runs(result, name)[0] for name in result["settings"]["criteria"]]
    before = {layer: pair[0] for layer, pair in runs[0]["widths"].items() if layer != "head"}
    after = {run["criterion"]: {layer: run["widths"][layer][1] for layer in before} for run in runs}
    return draw(
        plots.widths(before, after),
        folder / "widths.png",
        alt="Filters of each convolution before and after pruning, a panel per criterion.",
        caption=f"Filters of each convolution, seed {runs[0]['seed']}. Layers that add to the same "
        "stream (every `conv2` of a stage with its shortcut, and the stem) keep the same filters. "
        "The head keeps its ten outputs.",
    )


def _importance_section(result: Json, folder: Path) -> list[Section]:
    scores = result["importance"]
    if not scores:
        return []
    kept = {}
    for name, layers in scores.items():
        removed = _runs(result, name)[0]["removed"]
        kept[name] = {
            layer: [number not in removed.get(layer, ()) for number in range(len(values))]
            for layer, values in layers.items()
        }
    figure = draw(
        plots.importance(scores, kept),
        folder / "importance.png",
        alt="The scores of the filters of each layer of the dense network on a log axis.",
        caption=f"A dot per filter of the dense network (seed {result['settings']['seeds'][0]}, "
        "one pass over the training images), a tick at each layer's median; **hollow**: removed "
        "later. Coupled filters are scored together, and scores change in training, so "
        "high ones can be hollow. Units differ between panels; only the order within one counts.",
    )
    return [Section("How important the filters were", [figure])]


def _caveats(result: Json) -> str:
    images, seeds = result["data"]["test_images"], result["settings"]["seeds"]
    error = _standard_error(result)
    first = (
        f"The task is small: 8×8 pixels, {result['data']['train_images']:,} images to train on and "
        f"{images} to test. One test image is {100 / images:.2f} points, and the standard error of "
        f"one accuracy is about {error:.1f} points, so differences of that size are noise. "
    )
    if len(seeds) > 1:
        first += (
            f"Each of the {len(seeds)} seeds has its own split, dense network and pruning. "
            + _ranking(result)
        )
    else:
        first += (
            "This is one seed: it shows that the way from a dense to a smaller, working network "
            "holds, and does not rank the criteria. `--seeds 5` gives a spread."
        )
    control = ""
    if "random" in result["settings"]["criteria"]:
        control = (
            "`random` is the control: every set of coupled filters has the same chance to go. "
            "What a criterion finds shows in the distance to it, before fine-tuning above all."
        )
    last = (
        "FLOPs are counted, time is measured, and they do not fall alike: at these widths much of "
        "a pass is overhead per layer. The settings are fixed and no test image decides anything "
        "in a run, but they were chosen on this data set. Nothing here says how the criteria "
        "compare on large networks or data."
    )
    return "\n\n".join(part for part in (first, control, _collapse(result), last) if part)


def _standard_error(result: Json) -> float:
    """Of one accuracy on the test images, in points."""
    accuracy = _mean(one["accuracy"] for one in result["dense"])
    return 100 * math.sqrt(accuracy * (1 - accuracy) / result["data"]["test_images"])


def _ranking(result: Json) -> str:
    """Which criteria the seeds tell apart, and which they do not."""
    first, *others = result["settings"]["criteria"]
    mine = [run["accuracy"] for run in _runs(result, first)]
    apart: list[str] = []
    mixed: list[str] = []
    for name in others:
        theirs = [run["accuracy"] for run in _runs(result, name)]
        overlap = min(mine) <= max(theirs) and min(theirs) <= max(mine)
        (mixed if overlap else apart).append(f"`{name}`")
    parts = []
    if mixed:
        parts.append(f"the ranges of `{first}` and {' and '.join(mixed)} overlap: not ranked")
    if apart:
        parts.append(f"those of `{first}` and {' and '.join(apart)} do not overlap")
    text = f"After fine-tuning, {'; '.join(parts)}. " if parts else ""
    if "`random`" in mixed:
        text += (
            "Where random filters can go at no lasting cost, the network is larger than its task, "
            "and what a criterion is worth shows before fine-tuning (as pruned)."
        )
    return text


def _collapse(result: Json) -> str:
    """A warning where a criterion left next to nothing of a layer: then it was no fair contest."""
    parts = []
    for name in result["settings"]["criteria"]:
        widths = _runs(result, name)[0]["widths"]
        layer, (before, after) = min(widths.items(), key=lambda item: item[1][1] / item[1][0])
        if after <= before / 20:
            parts.append(f"`{name}` left {after} of {before} filters in `{layer}`")
    if not parts:
        return ""
    return (
        f"{'; '.join(parts)}: a bottleneck that fine-tuning does not mend. Filters are ranked over "
        "the whole network, and under this criterion nearly all of that layer's came last."
    )


def _method(result: Json) -> str:
    recipe = result["settings"]["recipe"]
    pruned = result["files"]["pruned.pt2"]
    return (
        f"The dense network is trained for {recipe['dense_epochs']} epochs. Each criterion starts "
        "from the same dense network and the same seed of minibatches: filters are scored on every "
        f"minibatch between `backward()` and `optimizer.step()`, {recipe['per_step']:.0%} of them "
        f"are switched off every {recipe['every']} minibatches while momentum SGD goes on, until "
        f"{result['settings']['flops']:.0%} of the FLOPs are left. Then they are removed for good "
        f"and the smaller network is fine-tuned for {recipe['finetune_epochs']} epochs.\n\n"
        f"`pruned.pt2` is the network of `{pruned['criterion']}`, seed {pruned['seed']}, as a "
        'torch.export program: `torch.export.load("pruned.pt2").module()(images)` needs PyTorch '
        f"alone. Loaded back, its logits differ by {pruned['max_abs_difference']:.1g} at most."
    )


def _settings_table(result: Json) -> Table:
    recipe = result["settings"]["recipe"]
    words = {
        "width": "channels of the first stage",
        "blocks": "residual blocks per stage",
        "batch_size": "minibatch",
        "weight_decay": "weight decay (weights only)",
        "dense_epochs": "epochs, dense",
        "dense_lr": "learning rate, dense",
        "every": "minibatches per pruning step",
        "per_step": "filters per step, fraction",
        "prune_lr": "learning rate while pruning",
        "finetune_epochs": "epochs of fine-tuning",
        "finetune_lr": "learning rate of fine-tuning",
    }
    rows = [[words[name], f"{recipe[name]:g}"] for name in words]
    rows.append(["seeds", ", ".join(map(str, result["settings"]["seeds"]))])
    return Table(("setting", "value"), rows)


def _runs(result: Json, criterion: str) -> list[Json]:
    return [run for run in result["runs"] if run["criterion"] == criterion]


def _percent(runs: Sequence[Json], key: str = "accuracy") -> str:
    return f"{100 * _mean(run[key] for run in runs):.1f}"


def _share(runs: Sequence[Json], dense: Sequence[Json], key: str) -> float:
    return _mean(run[key] for run in runs) / _mean(one[key] for one in dense)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
