"""The pages of `score` and `prune`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from taylor_kernels.studies.own import plots
from taylor_kernels.studies.own.artifacts import Artifact
from taylor_kernels.studies.own.tables import (
    blocks_table,
    files_table,
    layers_table,
    outcome_table,
    score_table,
    stays_table,
)
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.pruning import plots as pruning_plots
from taylor_kernels.studies.report import Figure, Report, Section, Table, Text
from taylor_kernels.studies.results import Json, footer

#: More layers than this make a figure that nobody reads; the tables have all.
_SHOWN = 60


def score_report(result: Json, scores: Mapping[str, Tensor], folder: Path) -> Report:
    """The report of a run of `score`; writes its plot to `folder` as PNG."""
    return Report(
        title=f"How much the filters of {result['model']} matter",
        lead=_score_lead(result),
        sections=[
            Section("Filter by filter", [_score_figure(result, scores, None, folder)]),
            Section("Layer by layer", [score_table(result)]),
            *_stays(result),
            *_notes(result),
        ],
        footer=footer(result),
    )


def prune_report(
    result: Json, scores: Mapping[str, Tensor], files: list[Artifact], folder: Path
) -> Report:
    """The report of a run of `prune`; writes its plots to `folder` as PNG."""
    sections = [
        Section("Before and after", [outcome_table(result)]),
        Section("On the way", [_course(result, folder)]),
        Section(
            "Where the filters went",
            [
                _widths(result, folder),
                layers_table(result["widths"]),
                *blocks_table(result["blocks"]),
            ],
        ),
        *_stays(result),
        Section(
            "How important the filters were",
            [_score_figure(result, scores, result["removed"], folder), score_table(result)],
        ),
        Section("Files", [files_table(files), Text(_use(files, result))]),
        Section("How it was done", [Text(_method(result))]),
        *_notes(result),
    ]
    return Report(
        title=f"{result['model']}, pruned", lead=_prune_lead(result), sections=sections,
        footer=footer(result),
    )  # fmt: skip


def _score_lead(result: Json) -> str:
    layers = result["layers"]
    filters = sum(layer["filters"] for layer in layers.values())
    return (
        f"`{result['criterion']}` over {result['minibatches']} minibatches: {filters:,} filters of "
        f"{len(layers)} layers. {len(result['skipped'])} layers cannot lose any."
    )


def _prune_lead(result: Json) -> str:
    before, pruned, after = (result[key] for key in ("dense", "pruned", "final"))
    time = after["ms"] / before["ms"]
    lead = (
        f"`{result['criterion']}` left {after['flops_fraction']:.0%} of the FLOPs and "
        f"{after['params_fraction']:.0%} of the parameters; a forward pass takes {time:.2f}× the "
        "time. "
    )
    if "accuracy" in before:
        return lead + (
            f"Accuracy went from {before['accuracy']:.1%} to {pruned['accuracy']:.1%} as pruned, "
            f"and to **{after['accuracy']:.1%}** by fine-tuning. {result['judged_on']}"
        )
    return lead + (
        f"The loss went from {before['loss']:.4g} to {pruned['loss']:.4g} as pruned, and to "
        f"**{after['loss']:.4g}** by fine-tuning. {result['judged_on']}"
    )


def _score_figure(
    result: Json,
    scores: Mapping[str, Tensor],
    removed: Mapping[str, list[int]] | None,
    folder: Path,
) -> Figure | Text:
    shown = {
        name or "model": [value if value > 0 else 0.0 for value in values.tolist()]
        for name, values in list(scores.items())[:_SHOWN]
        if any(math.isfinite(value) and value > 0 for value in values.tolist())
    }
    if not shown:
        return Text("No filter has a score above 0.")
    criterion = result["criterion"]
    kept = None
    if removed is not None:
        kept = {
            criterion: {
                name: [number not in removed.get(name, ()) for number in range(len(values))]
                for name, values in shown.items()
            }
        }
    more = f" The first {_SHOWN} layers." if len(scores) > _SHOWN else ""
    hollow = "" if removed is None else " **Hollow**: removed later; scores change in training."
    return draw(
        pruning_plots.importance({criterion: shown}, kept),
        folder / "scores.png",
        alt="The scores of the filters of each layer on a log axis.",
        caption=f"A dot per filter, a tick at each layer's median.{hollow}{more} Scores of 0 are "
        "left of the axis.",
    )


def _course(result: Json, folder: Path) -> Figure:
    measure = "accuracy" if "accuracy" in result["dense"] else "loss"
    return draw(
        plots.course(result["course"], result["pruned_at"], measure),
        folder / "course.png",
        alt=f"{measure} and what is left of the model against minibatches of training.",
        caption=f"{result['judged_on']} The target was met after {result['pruned_at']} "
        "minibatches of training.",
    )


def _widths(result: Json, folder: Path) -> Figure:
    widths = dict(list(result["widths"].items())[:_SHOWN])
    more = f" The first {_SHOWN} layers." if len(result["widths"]) > _SHOWN else ""
    return draw(
        pruning_plots.widths(
            {name or "model": before for name, (before, _) in widths.items()},
            {result["criterion"]: {n or "model": after for n, (_, after) in widths.items()}},
        ),
        folder / "widths.png",
        alt="Filters of each layer before and after pruning.",
        caption="Layers that add to the same stream keep the same filters." + more,
    )


def _stays(result: Json) -> list[Section]:
    if not result["skipped"]:
        return []
    return [Section("What cannot go", [stays_table(result["skipped"])])]


def _notes(result: Json) -> list[Section]:
    return [Section("Notes", [Text("\n\n".join(result["notes"]))])] if result["notes"] else []


def _use(files: list[Artifact], result: Json) -> str:
    """How to load what is there."""
    there = {file.name for file in files if not file.missing}
    parts = []
    if "pruned.safetensors" in there:
        parts.append(
            '`tk.load_pruned(model, "pruned.safetensors")` cuts a model that '
            f"`{result['model']}` makes, and loads its values."
        )
    if "pruned.pt2" in there:
        parts.append(
            '`torch.export.load("pruned.pt2").module()` runs where neither its code nor this '
            "package is."
        )
    parts.append(
        "`scores.safetensors` has the scores of the model before pruning, and their standard "
        "errors."
    )
    return "\n\n".join(parts)


def _method(result: Json) -> str:
    names = {"flops": "FLOPs", "params": "parameters", "filters": "filters"}
    kept = " and ".join(
        f"{value:.0%} of the {names[name]}" for name, value in result["targets"].items()
    )
    return (
        f"Every {result['every']} minibatches the filters that matter least to the whole model, by "
        f"`{result['criterion']}`, were switched off while {result['optimizer']} went on, until "
        f"{kept} were left. Then they were removed for good and the model fine-tuned for "
        f"{result['finetune']} epochs, under a cosine to 0 of the learning rate."
    )


def tables(result: Json, files: list[Artifact]) -> list[Table]:
    """What a run of `prune` prints."""
    found = [outcome_table(result), layers_table(result["widths"])]
    found += blocks_table(result["blocks"])
    if result["skipped"]:
        found.append(stays_table(result["skipped"]))
    return [*found, files_table(files)]
