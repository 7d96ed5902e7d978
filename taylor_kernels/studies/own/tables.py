"""Tables of a run of `score` or `prune`."""

from __future__ import annotations

from collections.abc import Sequence

from taylor_kernels.studies.own.artifacts import Artifact
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.results import Json


def score_table(result: Json) -> Table:
    """A row per layer: how many filters, and how much they matter."""
    rows = []
    layers = result["layers"]
    total = sum(layer["sum"] or 0.0 for layer in layers.values())
    for name, layer in layers.items():
        share = "" if not total or layer["sum"] is None else f"{max(layer['sum'], 0) / total:.1%}"
        rows.append(
            [
                name or "model",
                f"{layer['filters']}",
                *(_number(layer[key]) for key in ("least", "median", "greatest")),
                share,
                _number(layer["error"], 1),
            ]
        )
    return Table(
        ("layer", "filters", "least", "median", "greatest", "share of all", "relative error"),
        rows,
        caption=f"Scores by `{result['criterion']}` over {result['minibatches']} minibatches, "
        "greater matters more. Relative error: the median filter's standard error over its score.",
    )


def stays_table(skipped: dict[str, str]) -> Table:
    """Layers that cannot lose filters, and why."""
    return Table(
        ("layer", "why its filters stay"),
        [[name or "model", why] for name, why in skipped.items()],
        numeric=(),
    )


def stops_table(stops: Sequence[Json], criterion: str, per_example: bool) -> Table:
    """The way to the target without training: cost, time and loss."""
    judged = "accuracy" in stops[0]
    rows = []
    for number, stop in enumerate(stops):
        rows.append(
            [
                f"{number}" if number else "now",
                *(_share(stop, name) for name in ("filters", "params", "flops")),
                f"{stop['ms']:.2f} ({stop['ms'] / stops[0]['ms']:.2f}×)",
                f"{stop['loss']:.4g}",
                *([f"{stop['accuracy']:.1%}"] if judged else []),
            ]
        )
    of = "one example" if per_example else "a minibatch"
    return Table(
        ("stop", "filters", "parameters", "FLOPs", "ms per minibatch", "loss",
         *(["accuracy"] if judged else [])),
        rows,
        caption=f"What `{criterion}` would take off, the least important first, scored anew at "
        f"every stop and **not trained** in between. FLOPs of {of}, two per multiply-add; time: "
        "median of interleaved forward passes on this machine.",
        emphasis=(len(rows) - 1,),
    )  # fmt: skip


def layers_table(widths: dict[str, list[int]]) -> Table:
    """Layer by layer: filters now, then, and how many went."""
    rows = [
        [name or "model", f"{before}", f"{after}", f"{before - after}", f"{after / before:.0%}"]
        for name, (before, after) in widths.items()
    ]
    return Table(("layer", "filters", "left", "gone", "left, %"), rows)


def blocks_table(blocks: dict[str, list[str]]) -> list[Table]:
    """Which residual blocks went; no table where none could."""
    rows = [[key, f"{len(names)}", ", ".join(names)] for key, names in blocks.items()]
    if not any(blocks.values()):
        return []
    return [Table(("residual blocks", "", "which"), rows, numeric=(1,))]


def outcome_table(result: Json) -> Table:
    """The model before and after: size, cost, time and how well it does."""
    before, pruned, after = (result[key] for key in ("dense", "pruned", "final"))
    judged = "accuracy" in before
    rows = []
    for name, one in (("before", before), ("as pruned", pruned), ("fine-tuned", after)):
        ms = one.get("ms")
        time = "" if ms is None else f"{ms:.2f} ({ms / before['ms']:.2f}×)"
        rows.append(
            [
                name,
                *(_share(one, key) for key in ("filters", "params", "flops")),
                time,
                f"{one['loss']:.4g}",
                *([f"{one['accuracy']:.1%}"] if judged else []),
            ]
        )
    return Table(
        ("model", "filters", "parameters", "FLOPs", "ms per minibatch", "loss",
         *(["accuracy"] if judged else [])),
        rows,
        caption=f"Filters of the layers that can lose some. FLOPs of {result['flops_of']}, two per "
        f"multiply-add. Time: median of interleaved forward passes. {result['judged_on']}",
        emphasis=(2,),
    )  # fmt: skip


def files_table(files: Sequence[Artifact]) -> Table:
    """What was written, and what loading it again has shown."""
    rows = []
    for file in files:
        if file.missing:
            rows.append([file.name, "not written", "", file.missing])
        else:
            off = f"outputs within {file.difference:.1g}" if file.difference else "same outputs"
            if file.varies:
                off = "same tensors; its outputs vary"
            size = "any" if file.batch == "any" else "this"
            what = f"loaded again: {off}, {size} batch size"
            rows.append([file.name, "written", f"{file.bytes:,}", what])
    return Table(
        ("file", "", "bytes", "checked"),
        rows,
        caption="Differences are relative to the greatest output.",
        numeric=(2,),
    )


def _share(one: Json, name: str) -> str:
    return f"{one[name]:,} ({one[f'{name}_fraction']:.0%})"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"
