"""What a comparison shows of its result: the plots and the sections of the report."""

from __future__ import annotations

import math
from pathlib import Path

from taylor_kernels.studies.oracle import findings, late_norms
from taylor_kernels.studies.oracle.findings import values
from taylor_kernels.studies.oracle.plots import Curves, Scatter, coefficients, pruning, scatters
from taylor_kernels.studies.oracle.pruning_curves import CURVE_DRAWS
from taylor_kernels.studies.oracle.remarks import remarks
from taylor_kernels.studies.oracle.tables import (
    KINDS,
    STATISTICS,
    coefficient_tables,
    half_table,
    number,
    oracle_in_words,
    target_table,
)
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.report import Figure, Report, Section, Table, Text
from taylor_kernels.studies.results import Json, footer

#: Shown in scatter plots and, where there are too many, in curves.
_L2 = findings.UNSCALED.format("magnitude_l2")
_SHOWN = ("taylor_fo", "taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "random")


def build_report(result: Json, folder: Path) -> Report:
    """The report of a result; writes its plots to `folder` as PNG."""
    return Report(
        title="Do the scores say which filters matter?",
        lead=_lead(result),
        sections=sections(result, folder),
        footer=footer(result),
    )


def sections(result: Json, folder: Path) -> list[Section]:
    """The comparison as sections of a report."""
    found = [
        Section(
            "Agreement with the oracle",
            [_coefficients(result, folder), *coefficient_tables(result)],
        ),
        *_scatter_section(result, folder),
        *_curve_section(result, folder),
    ]
    if late := result.get("late_norms"):
        found.append(late_norms.section(late))
    if result["kind"] == "digits":
        said = "\n\n".join(remarks(result))
        found.append(Section("What this confirms, and what it contradicts", [Text(said)]))
        found.append(Section("Targets", [target_table(result)]))
    return [*found, Section("How it was done", [Text(_method(result))])]


def _lead(result: Json) -> str:
    parts = []
    for name, networks in findings.groups(result).items():
        best, *_ = findings.criteria(networks)
        said = [f"`{best}` {number(values(networks, best, 'spearman'))}"]
        said += [
            f"`{other}` {number(values(networks, other, 'spearman'))}"
            for other in ("taylor_fo_bn", "magnitude_l2", "random")
            if other != best and values(networks, other, "spearman")
        ]
        parts.append(f"{name}: {', '.join(said)}")
    return (
        f"Every criterion's scores beside the oracle: {oracle_in_words(result)}. Rank correlation "
        f"(Spearman) over all layers, best criterion first: {'; '.join(parts)}."
    )


def _coefficients(result: Json, folder: Path) -> Figure:
    rows = {}
    for name, networks in findings.groups(result).items():
        order = findings.criteria(networks)
        rows[name] = {
            label: {criterion: values(networks, criterion, statistic) for criterion in order}
            for statistic, label in STATISTICS.items()
        }
    seeds = len(result["networks"]) > len(rows)
    each = "Bars: mean; dots: each seed. " if seeds else ""
    return draw(
        coefficients(rows),
        folder / "correlation.png",
        alt="Spearman, Pearson and Kendall coefficients of each criterion with the oracle.",
        caption=f"{each}Over the filters of all layers. `random`: mean of {_draws(result)} draws.",
    )


def _scatter_section(result: Json, folder: Path) -> list[Section]:
    grid = []
    for name, networks in findings.groups(result).items():
        first = networks[0]
        chosen = [c for c in _SHOWN[:-1] if "scores" in first["criteria"].get(c, {})]
        if not chosen:
            chosen = [c for c in findings.criteria(networks) if "scores" in first["criteria"][c]]
        changes = [change for layer in first["oracle"]["changes"].values() for change in layer]
        last = max(len(first["widths"]) - 1, 1)
        depth = [n / last for n, width in enumerate(first["widths"].values()) for _ in range(width)]
        seen = [number for number, change in enumerate(changes) if change is not None]
        row = []
        for criterion in chosen[:5]:
            scores = first["criteria"][criterion]["scores"]
            rho = first["criteria"][criterion]["all"]["spearman"]
            row.append(
                Scatter(
                    f"{name}, {criterion}\nSpearman {number([rho] if rho is not None else [])}",
                    [math.nan if scores[n] is None else scores[n] for n in seen],
                    [changes[n] ** 2 for n in seen],
                    [depth[n] for n in seen],
                )
            )
        grid.append(row)
    figure = draw(
        scatters(grid),
        folder / "score_against_oracle.png",
        alt="Scores against the oracle on log axes, a dot per filter, a panel per criterion.",
        caption="A dot per filter of the first seed's network, coloured by the depth of its layer. "
        "Units of scores differ; a criterion that knew the order would draw a rising line. "
        "Scores and changes of 0 are left out.",
    )
    return [Section("Score against oracle, filter by filter", [figure])]


def _curve_section(result: Json, folder: Path) -> list[Section]:
    key = "accuracy" if all(network["classifies"] for network in result["networks"]) else "loss"
    rows = {}
    for name, networks in findings.groups(result).items():
        total = sum(networks[0]["widths"].values())
        kinds = []
        for kind, title in KINDS.items():
            names = [c for c, one in networks[0]["criteria"].items() if one.get(kind)]
            if kind == "one_shot":
                shown = [c for c in names if c in (*_SHOWN[1:], _L2, "oracle")]
                names = shown if len(shown) > 1 else names[:6]
            paths = {
                c: [
                    [
                        (100 * p["removed"] / total, p[key] * (100 if key == "accuracy" else 1))
                        for p in network["criteria"][c][kind]
                    ]
                    for network in networks
                ]
                for c in names
            }
            if paths:
                kinds.append(Curves(title, paths))
        if kinds:
            rows[name] = kinds
    if not rows:
        return []
    figure = draw(
        pruning(rows, "accuracy, %" if key == "accuracy" else "loss"),
        folder / "pruning_curves.png",
        alt=f"{key.capitalize()} against the filters removed, a line per criterion.",
        caption=_curve_caption(result, key),
    )
    blocks: list[Figure | Table] = [figure]
    halves = (
        findings.accuracy_at(networks, criterion, "one_shot", 0.5)
        for networks in findings.groups(result).values()
        for criterion in networks[0]["criteria"]
    )
    if any(halves):
        blocks.append(half_table(result))
    return [Section("Pruning curves", blocks)]


def _curve_caption(result: Json, key: str) -> str:
    settings, data = result["settings"], result["networks"][0]["data"]
    where = "test images" if result["kind"] == "digits" else "examples, the same that were scored"
    lines = "Lines: mean of the seeds, bands: their range. " if len(result["networks"]) > 1 else ""
    again = (
        f"Scored again: on the network as it is by then, over "
        f"{min(settings['minibatches'], data['minibatches'])} minibatches. "
    )
    trained = (
        f"Trained: {settings['finetune_epochs']} epoch at learning rate "
        f"{settings['finetune_lr']:g} after each step. "
        if result["kind"] == "digits"
        else ""
    )
    return (
        f"{lines}{key.capitalize()} on {data['test_examples']:,} {where}, filters removed in "
        f"ascending order of score over all layers, at least one kept in each. {again}{trained}"
        "Filters go one by one as the oracle removes them, skip connections notwithstanding; "
        "`tk.Pruner` removes coupled ones together. `random`: mean of "
        f"{CURVE_DRAWS} draws, one where it is trained."
    )


def _method(result: Json) -> str:
    """The circumstances, in words."""
    first, settings = result["networks"][0], result["settings"]
    common = (
        "Everything is measured in eval mode. The oracle of a filter is (loss without − loss with "
        "it)²; without means that its output is 0, behind the BatchNorm if one follows at once "
        "(any other layer sees the zeros). Criteria are averaged over "
        f"{first['data']['minibatches']} minibatches of {first['data']['minibatch']}. Where a "
        "criterion's scores mean nothing across layers (norms of weights), they are divided by "
        "their layer's mean, as the pruner ranks them; unscaled means that they are not. Filters "
        "of the output layer are not compared. Pearson's coefficient is with the square of the "
        "change: scores that estimate the change itself (`obd_bn`, `obd_fisher`, `taylor_abs`, "
        "norms) are at a disadvantage in it, but not in the ranks."
    )
    if result["kind"] != "digits":
        left = [f"`{layer}`: {why}" for layer, why in settings["left_out"].items()]
        return f"{common}\n\nLayers left out: {'; '.join(left)}." if left else common
    return (
        f"{len(result['networks'])} networks, scikit-learn's digits: {settings['words']}. Each "
        f"seed has its own split, {first['data']['oracle_examples']:,} images to train on and "
        f"{first['data']['test_examples']} to test, and its own start. Trained for "
        f"{settings['epochs']} epochs of minibatches of {settings['batch_size']} with momentum "
        f"SGD, learning rate {settings['lr']:g} falling to 0 by a cosine. Test accuracy: "
        f"{', '.join(_accuracy(network) for network in result['networks'])}.\n\n{common}"
    )


def _accuracy(network: Json) -> str:
    return f"{network['dense']['accuracy']:.1%} ({network['name']})"


def _draws(result: Json) -> int:
    random = result["networks"][0]["criteria"].get("random")
    return len(random["draws"]) if random else 0
