"""The tables of a comparison: for the report, the terminal and the README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from taylor_kernels.studies.oracle import findings
from taylor_kernels.studies.oracle.correlation import LEAST
from taylor_kernels.studies.oracle.findings import mean, values
from taylor_kernels.studies.report import Table

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

STATISTICS = {"spearman": "Spearman", "pearson": "Pearson", "kendall": "Kendall"}
KINDS = {
    "one_shot": "in one shot",
    "rescored": "scored again at each step",
    "finetuned": "scored again and trained",
}


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
            row += [number(values(networks, criterion, name)) for name in STATISTICS]
            row.append(number(values(networks, criterion, "spearman", "within")))
            runtime = _runtime(networks, criterion)
            row.append(f"{runtime['ratio']:.2f}" if runtime else "–")
        rows.append(row)
    return Table(columns, rows, caption=_summary_caption(result))


def target_table(result: Json) -> Table:
    rows = [target.row() for target in findings.targets(result)]
    return Table(("target", "limit", "measured: mean (range of seeds)", ""), rows, numeric=(1, 2))


def half_table(result: Json) -> Table:
    """Accuracy with half of the filters removed, by criterion, architecture and kind of curve.

    Raises:
        ValueError: there are no such curves, or no accuracy.
    """
    found = {}
    for name, networks in findings.groups(result).items():
        for kind, title in KINDS.items():
            seen = {
                c: findings.accuracy_at(networks, c, kind, 0.5) for c in networks[0]["criteria"]
            }
            if any(seen.values()):
                found[f"{name}: {title}"] = {c: mean(ones) for c, ones in seen.items() if ones}
    if not found:
        raise ValueError("result: holds no pruning curve of accuracy")
    held = Counter(criterion for column in found.values() for criterion in column)
    rows = [
        [
            name,
            *(f"{100 * column[name]:.1f}" if name in column else "–" for column in found.values()),
        ]
        for name, times in held.items()
        if 2 * times > max(held.values())  # with the others, most cells would be empty
    ]
    dense = "; ".join(
        f"{name} {100 * mean([one['dense']['accuracy'] for one in networks]):.1f}%"
        for name, networks in findings.groups(result).items()
    )
    caption = f"Accuracy, %, with half of the filters removed. With all: {dense}."
    return Table(["criterion", *found], rows, caption=caption)


def coefficient_tables(result: Json) -> list[Table]:
    """All coefficients of an architecture, over all layers and within, and the cost."""
    found = []
    for name, networks in findings.groups(result).items():
        rows = []
        for criterion in findings.criteria(networks):
            row = [criterion, _with_range(networks, criterion)]
            row += [number(values(networks, criterion, s)) for s in ("pearson", "kendall")]
            row += [number(values(networks, criterion, s, "within")) for s in STATISTICS]
            runtime = _runtime(networks, criterion)
            row += [f"{runtime['ms']:.2f}", f"{runtime['ratio']:.2f}"] if runtime else ["–", "–"]
            rows.append([*row, f"{runtime['peak_mib']:.0f}"] if "peak_mib" in runtime else row)
        columns = ["criterion", "Spearman", "Pearson", "Kendall"]
        columns += [f"{label} in a layer" for label in STATISTICS.values()] + ["ms", "× step"]
        columns += ["peak MiB"] if len(rows[0]) > len(columns) else []
        found.append(Table(columns, rows, caption=_table_caption(name, networks)))
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
    layers = max(one["layers"] for one in first["criteria"].values() if "layers" in one)
    caption = (
        f"**{name}**: {sizes}; {spread}. In a layer: mean of the coefficients within each of "
        f"{layers} layers, those with {LEAST} filters or more and no constant score. Kendall: "
        "tau-b."
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
    known = first["oracle"]["filters"] - first["oracle"].get("not_finite", 0)
    if known < first["oracle"]["filters"]:
        caption += f" Without some the loss is not finite: {known:,} are compared."
    fewer = [
        f"`{criterion}` has a score for {one['filters']:,} of them, in {one['layers']} layers"
        for criterion, one in first["criteria"].items()
        if one.get("filters", known) < known
    ]
    return f"{caption} {'; '.join(fewer)}." if fewer else caption


def _summary_caption(result: Json) -> str:
    first = result["networks"][0]
    count = max(len(networks) for networks in findings.groups(result).values())
    seeds = f"means of {count} seeds, " if count > 1 else ""
    return (
        f"Correlation with the oracle, {seeds}{oracle_in_words(result)}. Criteria over "
        f"{first['data']['minibatches']} minibatches of {first['data']['minibatch']}, eval mode. "
        "In a layer: mean within layers. × step: time of a minibatch over that of forward + "
        "backward."
    )


def _runtime(networks: Sequence[Json], criterion: str) -> Json:
    """Of the network whose runtimes were taken; empty if there is none."""
    criterion = criterion.removesuffix(findings.UNSCALED.format(""))  # costs the same
    for network in networks:
        if found := (network["runtimes"] or {}).get(criterion):
            return found
    return {}


def oracle_in_words(result: Json) -> str:
    network = result["networks"][0]
    oracle, data = network["oracle"], network["data"]
    examples = f"{data['oracle_examples']:,} examples"
    if oracle["filters"] == oracle["total"]:
        return f"each filter really removed, one at a time, and the loss measured on {examples}"
    return (
        f"{oracle['filters']:,} of {oracle['total']:,} filters, chosen at random (seed "
        f"{oracle['seed']}), really removed, one at a time, and the loss measured on {examples}"
    )


def number(found: Sequence[float]) -> str:
    return f"{mean(found):.3f}" if found else "–"
