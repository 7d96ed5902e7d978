"""What a comparison shows of its result: tables, plots and the sections of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from taylor_kernels import plots
from taylor_kernels.compare import findings
from taylor_kernels.compare.findings import Json, mean, values
from taylor_kernels.compare.measure import CURVE_DRAWS
from taylor_kernels.compare.plots import Cloud, Curves, clouds, coefficients, pruning
from taylor_kernels.report import Figure, Report, Section, Table, Text

STATISTICS = {"spearman": "Spearman", "pearson": "Pearson", "kendall": "Kendall"}
_KINDS = {
    "one_shot": "in one shot",
    "rescored": "scored again at each step",
    "finetuned": "scored again and trained",
}
#: Shown in scatter plots and, where there are too many, in curves.
_SHOWN = ("taylor_fo", "taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "random")


def summary_table(result: Json) -> Table:
    """A row per criterion: its coefficients and its cost, for every architecture."""
    groups = findings.groups(result)
    columns = ["criterion"]
    for name in groups:
        prefix = f"{name}: " if len(groups) > 1 else ""
        columns += [f"{prefix}Spearman", "Pearson", "Kendall", "Spearman in a layer", "× step"]
    order = findings.criteria([n for networks in groups.values() for n in networks])
    rows = []
    for criterion in order:
        row = [criterion]
        for networks in groups.values():
            row += [_number(values(networks, criterion, name)) for name in STATISTICS]
            row.append(_number(values(networks, criterion, "spearman", "within")))
            row.append(_cost(networks, criterion))
        rows.append(row)
    return Table(columns, rows, caption=_summary_caption(result))


def target_table(result: Json) -> Table:
    rows = [target.row() for target in findings.targets(result)]
    return Table(("target", "limit", "measured: mean (range of seeds)", ""), rows, numeric=(1, 2))


def build_report(result: Json, folder: Path) -> Report:
    """The report of a result; writes its plots to `folder` as PNG."""
    return Report(
        title="Do the scores say which filters matter?",
        lead=_lead(result),
        sections=sections(result, folder),
        footer=_footer(result),
    )


def sections(result: Json, folder: Path) -> list[Section]:
    """The comparison as sections of a report."""
    found = [
        Section("Agreement with the oracle", [_coefficients(result, folder), *_tables(result)]),
        *_cloud_section(result, folder),
        *_curve_section(result, folder),
    ]
    said = "\n\n".join(findings.remarks(result))
    if said:
        found.append(Section("What this confirms, and what it contradicts", [Text(said)]))
    if result["kind"] == "digits":
        found.append(Section("Targets", [target_table(result)]))
    return [*found, Section("How it was done", [Text(_method(result))])]


def _lead(result: Json) -> str:
    parts = []
    for name, networks in findings.groups(result).items():
        best, *_ = findings.criteria(networks)
        said = [f"`{best}` {_number(values(networks, best, 'spearman'))}"]
        said += [
            f"`{other}` {_number(values(networks, other, 'spearman'))}"
            for other in ("taylor_fo_bn", "magnitude_l2", "random")
            if other != best and values(networks, other, "spearman")
        ]
        parts.append(f"{name}: {', '.join(said)}")
    return (
        f"Every criterion's scores beside the oracle: {_oracle_words(result)}. Rank correlation "
        f"(Spearman) over all layers, best criterion first: {'; '.join(parts)}."
    )


def _oracle_words(result: Json) -> str:
    network = result["networks"][0]
    oracle, data = network["oracle"], network["data"]
    examples = f"{data['oracle_examples']:,} examples"
    if oracle["filters"] == oracle["total"]:
        return f"each filter really removed, one at a time, and the loss measured on {examples}"
    return (
        f"{oracle['filters']:,} of {oracle['total']:,} filters, chosen at random (seed "
        f"{oracle['seed']}), really removed, one at a time, and the loss measured on {examples}"
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
    return plots.draw(
        coefficients(rows),
        folder / "correlation.png",
        alt="Spearman, Pearson and Kendall coefficients of each criterion with the oracle.",
        caption=f"{each}Over the filters of all layers. `random`: mean of {_draws(result)} draws.",
    )


def _tables(result: Json) -> list[Table]:
    """All coefficients of an architecture, over all layers and within, and the cost."""
    found = []
    for name, networks in findings.groups(result).items():
        rows = []
        for criterion in findings.criteria(networks):
            row = [criterion, _with_range(networks, criterion)]
            row += [_number(values(networks, criterion, s)) for s in ("pearson", "kendall")]
            row += [_number(values(networks, criterion, s, "within")) for s in STATISTICS]
            rows.append([*row, *_runtime(networks, criterion)])
        columns = ["criterion", "Spearman", "Pearson", "Kendall"]
        columns += [f"{label} in a layer" for label in STATISTICS.values()]
        caption = _table_caption(name, networks)
        found.append(Table([*columns, "ms", "× step"], rows, caption=caption))
    return found


def _with_range(networks: Sequence[Json], criterion: str) -> str:
    """Mean and range of the seeds; of one network the interval over its filters."""
    seen = values(networks, criterion, "spearman")
    if not seen:
        return "–"
    if len(seen) > 1:
        return f"{mean(seen):.3f} ({min(seen):.3f} to {max(seen):.3f})"
    low, high = networks[0]["criteria"][criterion].get("interval", {}).get("spearman", (None, None))
    return f"{seen[0]:.3f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def _table_caption(name: str, networks: Sequence[Json]) -> str:
    first = networks[0]
    sizes = f"{first['oracle']['filters']:,} filters in {len(first['widths'])} layers"
    spread = (
        f"mean and range of {len(networks)} seeds"
        if len(networks) > 1
        else "in brackets a 95% bootstrap interval over filters"
    )
    layers = first["criteria"][findings.criteria(networks)[0]]["layers"]
    caption = (
        f"**{name}**: {sizes}; {spread}. In a layer: mean of the coefficients within each of "
        f"{layers} layers. Kendall: tau-b."
    )
    if runtimes := first["runtimes"]:
        plain = runtimes["forward + backward"]["ms"]
        caption += (
            f" Time: median of a minibatch of {first['data']['minibatch']}, interleaved; a step is "
            f"a plain forward and backward pass, {plain:.2f} ms."
        )
    if first["skipped"]:
        why = "; ".join(
            f"`{criterion}`: {reason}" for criterion, reason in first["skipped"].items()
        )
        caption += f" Left out: {why}."
    fewer = [
        f"`{criterion}` has a score for {one['filters']:,} of them"
        for criterion, one in first["criteria"].items()
        if one.get("filters", first["oracle"]["filters"]) < first["oracle"]["filters"]
    ]
    return f"{caption} {'; '.join(fewer)}." if fewer else caption


def _summary_caption(result: Json) -> str:
    first = result["networks"][0]
    count = max(len(networks) for networks in findings.groups(result).values())
    seeds = f"means of {count} seeds, " if count > 1 else ""
    return (
        f"Correlation with the oracle, {seeds}{_oracle_words(result)}. Criteria over "
        f"{first['data']['minibatches']} minibatches of {first['data']['minibatch']}, eval mode. "
        "In a layer: mean within layers. × step: time of a minibatch over that of forward + "
        "backward."
    )


def _runtime(networks: Sequence[Json], criterion: str) -> list[str]:
    for network in networks:
        if found := (network["runtimes"] or {}).get(criterion):
            return [f"{found['ms']:.2f}", f"{found['ratio']:.2f}"]
    return ["–", "–"]


def _cost(networks: Sequence[Json], criterion: str) -> str:
    return _runtime(networks, criterion)[1]


def _cloud_section(result: Json, folder: Path) -> list[Section]:
    grid = []
    depth = 0
    for name, networks in findings.groups(result).items():
        first = networks[0]
        chosen = [c for c in _SHOWN[:-1] if "scores" in first["criteria"].get(c, {})]
        if not chosen:
            chosen = [c for c in findings.criteria(networks) if "scores" in first["criteria"][c]]
        changes = [change for layer in first["oracle"]["changes"].values() for change in layer]
        layers = [n for n, width in enumerate(first["widths"].values()) for _ in range(width)]
        depth = max(depth, len(first["widths"]))
        seen = [number for number, change in enumerate(changes) if change is not None]
        row = []
        for criterion in chosen[:5]:
            scores = first["criteria"][criterion]["scores"]
            rho = first["criteria"][criterion]["all"]["spearman"]
            row.append(
                Cloud(
                    f"{name}, {criterion}\nSpearman {_number([rho] if rho is not None else [])}",
                    [math.nan if scores[n] is None else scores[n] for n in seen],
                    [changes[n] ** 2 for n in seen],
                    [layers[n] for n in seen],
                )
            )
        grid.append(row)
    figure = plots.draw(
        clouds(grid, depth),
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
        for kind, title in _KINDS.items():
            names = [c for c, one in networks[0]["criteria"].items() if one.get(kind)]
            if kind == "one_shot":
                shown = [c for c in names if c in (*_SHOWN[1:], "oracle")]
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
    figure = plots.draw(
        pruning(rows, "accuracy, %" if key == "accuracy" else "loss"),
        folder / "pruning_curves.png",
        alt=f"{key.capitalize()} against the filters removed, a line per criterion.",
        caption=_curve_caption(result, key),
    )
    blocks: list[Figure | Table] = [figure]
    if key == "accuracy":
        blocks += [
            _half_table(name, networks) for name, networks in findings.groups(result).items()
        ]
    return [Section("Pruning curves", blocks)]


def _curve_caption(result: Json, key: str) -> str:
    settings, data = result["settings"], result["networks"][0]["data"]
    where = "test images" if result["kind"] == "digits" else "examples, the same that were scored"
    lines = "Lines: mean of the seeds, bands: their range. " if len(result["networks"]) > 1 else ""
    again = (
        f"Scored again: on the network as it is by then, over {settings['minibatches']} "
        "minibatches. "
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


def _half_table(name: str, networks: Sequence[Json]) -> Table:
    names = list(networks[0]["criteria"])
    kinds = [
        kind for kind in _KINDS if any(one.get(kind) for one in networks[0]["criteria"].values())
    ]
    rows = []
    for criterion in names:
        found = [findings.at(networks, criterion, kind, 0.5) for kind in kinds]
        rows.append([criterion, *(f"{mean(f):.1%}" if f else "–" for f in found)])
    dense = mean([network["dense"]["accuracy"] for network in networks])
    return Table(
        ["criterion", *(_KINDS[kind] for kind in kinds)],
        rows,
        caption=f"**{name}**: accuracy with half of the filters removed; {dense:.1%} with all.",
    )


def _method(result: Json) -> str:
    """The circumstances, in words."""
    first, settings = result["networks"][0], result["settings"]
    common = (
        "Everything is measured in eval mode. The oracle of a filter is (loss without − loss with "
        "it)²; without means that its output is 0 behind the BatchNorm. Criteria are averaged over "
        f"{first['data']['minibatches']} minibatches of {first['data']['minibatch']}. Where a "
        "criterion's scores mean nothing across layers (norms of weights), they are divided by "
        "their layer's mean, as the pruner ranks them. Filters of the output layer are not "
        "compared."
    )
    if result["kind"] != "digits":
        return common
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


def _footer(result: Json) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"`{result['command']}`\n\n{result['date']}, {result['seconds']:.0f} s, {where}. "
        f"{versions}. All numbers are in `result.json`."
    )


def _draws(result: Json) -> int:
    random = result["networks"][0]["criteria"].get("random")
    return len(random["draws"]) if random else 0


def _number(found: Sequence[float]) -> str:
    return f"{mean(found):.3f}" if found else "–"
