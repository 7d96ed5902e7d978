"""Tables, plot and targets of the benches of per-example squared gradients."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.figures import Case, Entry, PerformanceTarget, Results
from bench.markdown import TIMING, ms, number, table, timing
from bench.plot import COLOURS, pyplot

#: The project's limits for a step on the CPU, over forward and backward alone.
STEP_LIMITS = {"convnet": 1.3, "resnet18": 2.5}
PEAK_LIMIT = 1.2
#: The loop's cost for twice the images is four times; ours may be this much above twice, all told.
LINEAR_LIMIT = 1.1
#: On a GPU: over the library's weight gradient; and over the peers' step and memory.
LAYER_LIMIT = 1.5
GPU_STEP_FACTOR, GPU_PEAK_LIMIT = 5.0, 0.25
LINES = {"plain": "#999999", "taylor-kernels": "#0072B2", "torch-pruning": COLOURS["Torch-Pruning"]}


def by_second(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Cases by the second part of their names: a network, with its precision."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.name[1], []).append(case)
    return found


def step_table(case: Case) -> str:
    rows = [
        [
            *timing(e),
            number(e.info["ratio_to_plain"]),
            number(e.info["peak_mib"], "{:.0f}"),
            number(e.info["peak_to_plain"]),
            number(e.info["error"], "{:.0e}"),
        ]
        for e in case.entries
    ]
    head = ["step", *TIMING, "× forward + backward", "peak MiB"]
    return table([*head, "× its peak", "error"], rows)


def batch_table(cases: list[Case]) -> str:
    """Rows are batch sizes; each way's time and its share of the plain step's."""
    labels = [e.label for e in max(cases, key=lambda case: len(case.entries)).entries]
    rows = []
    for case in cases:
        found = [case.get(label) for label in labels]
        cells = [
            f"{ms(e.median)} ({number(e.info['ratio_to_plain'])}×)" if e else "–" for e in found
        ]
        rows.append([case.name[2], *cells])
    return table(["", *(f"{label}, ms" for label in labels)], rows)


def layer_table(cases: list[Case]) -> str:
    """A row per layer, and one for all layers of the network."""
    labels = [e.label for case in cases[:1] for e in case.entries]
    ours = [label for label in labels if label.startswith("ours")]
    rows = []
    for case in cases:
        info = case.entries[0].info
        shape = "×".join(str(size) for size in info["weight"])
        where = f"{shape}{' /2' if info['stride'] == 2 else ''} on " + _input(info["input"])
        found = {label: case.get(label) for label in labels}
        rows.append([case.name[2], str(info["count"]), where, *_layer_cells(found, labels, ours)])
    sums = {label: _total(cases, label) for label in labels}
    plain = sums[labels[0]]
    rows.append(
        ["all layers", "", ""]
        + [number(s and s * 1e3, "{:.2f}") for s in sums.values()]
        + [number(s and plain and s / plain) for s in (sums[label] for label in ours)]
        + [""] * len(labels)
    )
    head = ["layer", "of them", "weight", *(f"{label}, ms" for label in labels)]
    head += [f"{label}, × gradient" for label in ours]
    of_peak = " (% of peak)" if cases[0].entries[0].info["percent_of_peak"] else ""
    return table([*head, *(f"{label}, GFLOP/s{of_peak}" for label in labels)], rows)


def _input(shape: list[int]) -> str:
    if len(shape) == 4:
        return f"{shape[0]}×{shape[2]}×{shape[3]}"
    return "×".join(str(size) for size in shape[:-1])


def _layer_cells(found: dict[str, Entry | None], labels: list[str], ours: list[str]) -> list[str]:
    def speed(e: Entry) -> str:
        share = e.info["percent_of_peak"]
        return f"{e.info['gflops']:.0f}" + ("" if share is None else f" ({share:.0f}%)")

    return [
        *((ms(e.median) if e else "–") for e in (found[label] for label in labels)),
        *(number(e and e.info["ratio_to_gradient"]) for e in (found[label] for label in ours)),
        *((speed(e) if e else "–") for e in (found[label] for label in labels)),
    ]


def _total(cases: list[Case], label: str) -> float | None:
    """Seconds over all layers of a network; None if one is missing."""
    entries = [case.get(label) for case in cases]
    if not all(entries):
        return None
    return sum(e.median * e.info["count"] for e in entries if e)


def parts(results: Results) -> list[str]:
    """What the report holds of these benches."""
    found = []
    for case in results.of("fisher_step"):
        found += [f"## {' · '.join(case.name)}", step_table(case)]
    batches = by_second(results.of("fisher_batch"))
    if batches:
        found += ["## fisher_batch", "![time of a step over the batch's size](batches.png)"]
    for network, cases in batches.items():
        found += [f"### {network}", batch_table(cases)]
    for network, cases in by_second(results.of("conv2d_fisher")).items():
        found += [f"## conv2d_fisher · {network}", layer_table(cases)]
    return found


def targets(results: Results) -> list[PerformanceTarget]:
    found = []
    for case in results.of("fisher_step"):
        found += _step_targets(case)
    for network, cases in by_second(results.of("fisher_batch")).items():
        least, most = cases[0].ours, cases[-1].ours
        if least and most:
            images = [e.info["images"] for e in (least, most)]
            found.append(
                PerformanceTarget(
                    f"fisher_batch {network}: time an image with {images[1]}, over that with "
                    f"{images[0]}",
                    LINEAR_LIMIT,
                    (most.median / images[1]) / (least.median / images[0]),
                )
            )
    for network, cases in by_second(results.of("conv2d_fisher")).items():
        for label in ("ours", "ours (triton)", "ours (cuda)"):
            entries = [(case.get(label), case) for case in cases]
            ratios = [(e.info["ratio_to_gradient"], case) for e, case in entries if e]
            if ratios and "gpu" in results.machine:
                ratio, case = max(ratios, key=lambda pair: pair[0])
                what = f"conv2d_fisher {network}, {label}: over the weight gradient (worst: "
                found.append(PerformanceTarget(f"{what}{case.name[2]})", LAYER_LIMIT, ratio))
    return found


def _step_targets(case: Case) -> list[PerformanceTarget]:
    ours, where = case.ours, " ".join(case.name)
    if ours is None:
        return []
    limit = STEP_LIMITS.get(case.name[1])
    if limit is not None:
        info = ours.info
        found = [
            PerformanceTarget(f"{where}: over forward + backward", limit, info["ratio_to_plain"])
        ]
        if info["peak_to_plain"] is not None:
            what = f"{where}: peak memory over forward + backward's"
            found.append(PerformanceTarget(what, PEAK_LIMIT, info["peak_to_plain"]))
        return found
    found = []
    for peer in case.entries:
        if peer.info["family"] in ("backpack", "vmap"):
            faster = peer.median / ours.median
            found.append(
                PerformanceTarget(
                    f"{where}: faster than {peer.label}", GPU_STEP_FACTOR, faster, True
                )
            )
            share = ours.info["peak_mib"] / peer.info["peak_mib"]
            found.append(
                PerformanceTarget(
                    f"{where}: peak memory over {peer.label}'s", GPU_PEAK_LIMIT, share
                )
            )
    return found


def draw_batches(results: Results, path: Path) -> None:
    """A step's time over the batch's size, both on log scales: a line's slope is its power."""
    networks = by_second(results.of("fisher_batch"))
    if not networks:
        return
    plt = pyplot()
    figure, every = plt.subplots(
        1, len(networks), figsize=(4 * len(networks), 3.4), sharey=True, squeeze=False
    )
    for axes, (network, cases) in zip(every[0], networks.items(), strict=True):
        for family, colour in LINES.items():
            found = [e for case in cases for e in case.entries if e.info["family"] == family]
            if not found:
                continue
            images = [e.info["images"] for e in found]
            seconds = [e.median for e in found]
            axes.plot(images, seconds, "o-", color=colour, markersize=4, label=found[0].label)
            times = found[-1].info["ratio_to_plain"]
            if family != "plain":
                axes.annotate(
                    f"{times:.2g}×", (images[-1], seconds[-1]), xytext=(6, 0),
                    textcoords="offset points", va="center", color=colour, fontsize=8,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = [case.entries[0].info["images"] for case in cases]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.6)
        axes.set_xlabel("images in the batch")
        axes.set_title(network, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    every[0][0].set_ylabel("seconds a step (× forward + backward)")
    every[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
