"""What the documentation quotes of kept results, in Markdown: tables with their source.

No figure in a page is typed; each of these functions makes what stands between two markers of one.
"""

from __future__ import annotations

from pathlib import Path

from bench.figures import OPS, Entry, Results
from bench.markdown import ms, number, table
from bench.report import machine_line
from taylor_kernels.studies.oracle.late_norms import section as late_norms_section
from taylor_kernels.studies.oracle.tables import half_table, summary_table
from taylor_kernels.studies.pruning.pages import result_table
from taylor_kernels.studies.results import Json

#: Results as they are kept, relative to the repository. `make demo` leaves its own in runs/demo.
DEMO = Path("bench/results/demo/result.json")
STUDY = Path("bench/results/study")
SAMPLING = STUDY / "sampling.json"


def demo_block(result: Json) -> str:
    """The demo's table, with its caption and source."""
    made = result_table(result)
    source = f"Source: `{DEMO.as_posix()}`, written by `make demo`."
    return "\n\n".join((table(made.columns, made.rows), f"{made.caption} {source}"))


def study_block(result: Json) -> str:
    """The study's two tables, with their captions and source."""
    parts = []
    for made in (summary_table(result), half_table(result)):
        parts += [table(made.columns, made.rows), made.caption]
    parts[-1] += (
        f" Curves: `{STUDY}/pruning_curves.png`. Source: `{STUDY}/result.json`, written by "
        "`python -m bench.study`."
    )
    return "\n\n".join(parts)


def late_norms_block(result: Json) -> str:
    """The study's table of networks whose norms come late, and how to read it."""
    said, shown = late_norms_section(result["late_norms"]).blocks
    return f"{table(shown.columns, shown.rows)}\n\n{said.text}"


def sampling_block(result: Json) -> str:
    """What agreement with the oracle is bought for how many plain steps."""
    networks = result["networks"]
    head = ["criterion"]
    for name, found in networks.items():
        known = "spearman" in next(iter(found.values()))
        head += [f"{name}: Spearman", "least", "Pearson", "Kendall"] if known else []
        head.append("× step" if known else f"{name}: × step")
    rows = []
    for criterion in next(iter(networks.values())):
        row = [f"`{criterion}`"]
        for found in networks.values():
            one = found.get(criterion, {})
            if "spearman" in next(iter(found.values())):
                shown = ("spearman", "least_spearman", "pearson", "kendall")
                row += [number(one.get(key), "{:.4f}") for key in shown]
            row.append(number(one.get("ratio")))
        rows.append(row)
    return "\n\n".join(
        (
            table(head, rows),
            "Correlation with the oracle over all layers: means of 3 seeds, and the least. × step: "
            "time of a minibatch over that of forward + backward; the first three updates of a "
            "meter look for rounding noise, and two of these were timed. "
            f"{result['machine']['cpu']}, {result['machine']['threads']} thread. Source: "
            f"`{SAMPLING.as_posix()}`, written by `{result['command']}`.",
        )
    )


def headline_block(results: Results) -> str:
    """How fast, in two sentences."""
    (both,) = (c for c in results.of("filter_moments") if c.name[1:] == ("resnet50-fp32", "both"))
    ours, step = both.ours, results.of("scoring_step")[0]
    assert ours is not None
    peers = ", ".join(
        f"{label} {peer.median / ours.median:.1f}×"
        for family, label in _PEERS.items()
        if (peer := both.fastest(family=family, role="peer"))
    )
    ratios = ", ".join(
        f"{entry.info['ratio_to_plain']:.2f}× {words}"
        for label, words in _STEPS.items()
        if (entry := step.get(label))
    )
    return (
        f"Sums over every filter of ResNet-50, rows and columns, take {ms(ours.median)} ms on two "
        f"CPU threads; others take longer: {peers}. Scoring ResNet-18 under `taylor_fo_bn` takes, "
        f"over a forward and a backward pass: {ratios} (`{results.path.as_posix()}`)."
    )


#: Peers and steps of the headline, with the words for them.
_PEERS = {"eager": "eager PyTorch", "compile": "torch.compile", "torch-pruning": "Torch-Pruning"}
_STEPS = {"with taylor_fo_bn": "in training", "scoring, taylor_fo_bn": "inside `tk.scoring`"}


def bench_block(results: Results) -> str:
    """Ours against each kind of peer, and the steps."""
    rows = []
    for case in (c for op in OPS for c in results.of(op)):
        ours, floor = case.ours, case.fastest(role="floor")
        if ours is None or floor is None:
            continue
        families = ("eager", "foreach", "compile", "compile-static", "torch-pruning")
        peers = [case.fastest(family=family, role="peer") for family in families]
        rows.append(
            [
                f"`{case.name[0]}` {', '.join(case.name[1:])}",
                ms(ours.median),
                number(ours.median / floor.median),
                *(number(p and p.median / ours.median, "{:.1f}×") for p in peers),
                number(ours.info["peak_mib"], "{:.2f}"),
                str(results.number_of(case)),
            ]
        )
    head = ["", "ours, ms", "× one read", "eager", "`_foreach`", "torch.compile", "one graph"]
    parts = [
        "How many times as long each peer takes, measured in turns in one process:",
        table([*head, "Torch-Pruning", "peak MiB", "run"], rows),
    ]
    for case in results.of("pruning_sequence"):
        steps = [
            [
                e.label,
                str(e.info["steps"]),
                ms(e.info["first_pass_per_step_s"]),
                str(e.info["graphs"]),
            ]
            for e in case.entries
        ]
        parts += [
            "Scoring ResNet-50 while pruning changes its shapes every step, compilation included "
            f"(run {results.number_of(case)}):",
            table(["", "steps", "ms a step", "graphs compiled"], steps),
        ]
    cases = results.of("scoring_step")
    if cases:
        labels = [e.label for e in cases[0].entries]
        found = [[case.get(label) for case in cases] for label in labels]
        parts += [
            "A scoring step of ResNet-18, relative to forward + backward alone (run "
            f"{results.number_of(cases[0])}):",
            table(
                ["", *(case.name[2].replace("x", "×") for case in cases)],
                [
                    [label, *(number(e and e.info["ratio_to_plain"]) for e in each)]
                    for label, each in zip(labels, found, strict=True)
                ],
            ),
        ]
    parts += _fisher_step_parts(results)
    source = results.path.as_posix()
    parts.append(f"{machine_line(results)}. Source: `{source}`, written by `make bench`.")
    return "\n\n".join(parts)


def _fisher_step_parts(results: Results) -> list[str]:
    cases = results.of("fisher_step")
    if not cases:
        return []
    labels = list(dict.fromkeys(e.label for case in cases for e in case.entries))

    def cell(entry: Entry | None) -> str:
        if entry is None:
            return "–"
        peak = number(entry.info["peak_mib"], "{:.0f}")
        return f"{number(entry.info['ratio_to_plain'])} ({peak})"

    rows = [[label, *(cell(case.get(label)) for case in cases)] for label in labels]
    return [
        "A step that gives every filter Σ w² · mean g² over examples (`obd_fisher`), 32 images of "
        "32², relative to forward + backward alone, and its peak memory in MiB (run "
        f"{results.number_of(cases[0])}):",
        table(["", *(", ".join(case.name[1:]) for case in cases)], rows),
    ]
