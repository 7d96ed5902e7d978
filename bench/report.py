"""Turns a results file into a Markdown report, a plot, and the README's figures.

    python -m bench.report bench/results/cpu/latest.json     # beside it: report.md, *.png
    python -m bench.report bench/results/cpu/latest.json --readme README.md

The second also rewrites what stands between `<!-- bench:begin -->` and `<!-- bench:end -->`: no
figure in the README is typed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import fisher_report
from bench.figures import OPS, Case, Results, Target, load, targets
from bench.markdown import ms, number, table
from bench.plot import draw

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def _op_table(case: Case, on_gpu: bool) -> str:
    speed = "percent_of_copy" if on_gpu else "percent_of_floor"
    rows = [
        [
            e.label,
            ms(e.median),
            ms(e.stats["min"]),
            ms(e.stats["iqr"]),
            number(e.info["ratio_to_floor"]),
            number(e.info["ratio_to_ours"]),
            number(e.info["gb_per_s"], "{:.1f}"),
            number(e.info[speed], "{:.0f}"),
            number(e.info["peak_mib"], "{:.1f}"),
            number(e.info["error"], "{:.1f}"),
            number(e.info["first_call_s"], "{:.2f}"),
        ]
        for e in case.entries
    ]
    share = "% of copy" if on_gpu else "% of floor"
    head = ["provider", "median ms", "min ms", "IQR ms", "× floor", "× ours"]
    return table([*head, "GB/s", share, "peak MiB", "error", "first call s"], rows)


def _sequence_table(case: Case) -> str:
    rows = [
        [
            e.label,
            str(e.info["steps"]),
            ms(e.info["first_pass_per_step_s"]),
            ms(e.median),
            number(e.info["first_pass_s"], "{:.2f}"),
            str(e.info["graphs"]),
            number(e.info["peak_mib"], "{:.1f}"),
        ]
        for e in case.entries
    ]
    head = ["provider", "steps", "first pass, ms a step", "later passes, ms a step"]
    return table([*head, "first pass s", "graphs compiled", "peak MiB"], rows)


def _step_table(case: Case) -> str:
    rows = [
        [
            e.label,
            ms(e.median),
            ms(e.stats["min"]),
            ms(e.stats["iqr"]),
            number(e.info["ratio_to_plain"]),
            number(e.info["peak_mib"], "{:.0f}"),
        ]
        for e in case.entries
    ]
    head = ["step", "median ms", "min ms", "IQR ms", "× forward + backward", "peak MiB"]
    return table(head, rows)


def all_targets(results: Results) -> list[Target]:
    """What the project set out to reach, from whatever cases the file holds."""
    return targets(results) + fisher_report.targets(results)


def machine_line(results: Results) -> str:
    m = results.machine
    processor = m.get("gpu") or f"{m['cpu']['brand_raw']}, {m['isa']}, {m['threads']} threads"
    return (
        f"{processor}; PyTorch {m['torch']}, Python {m['python_version']}, {m['compiler']}; "
        f"{'; '.join(results.runs)}"
    )


def report(results: Results) -> str:
    """The whole report in Markdown."""
    on_gpu = "gpu" in results.machine
    parts = ["# Benches", machine_line(results) + ".", "## Targets"]
    parts.append(
        table(["target", "limit", "measured", ""], [t.row() for t in all_targets(results)])
        + "\n\n![speed-up of ours over each peer](ratios.png)"
    )
    how: dict[str, Callable[[Case], str]] = {
        **dict.fromkeys(OPS, lambda case: _op_table(case, on_gpu)),
        "pruning_sequence": _sequence_table,
        "scoring_step": _step_table,
    }
    for bench, make in how.items():
        for case in results.of(bench):
            parts += [f"## {' · '.join(case.name)}", make(case)]
    parts += fisher_report.parts(results)
    return "\n\n".join(parts) + "\n"


def readme_block(results: Results) -> str:
    """The README's figures: ours against each kind of peer, and the steps."""
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
            ]
        )
    head = ["", "ours, ms", "× one read", "eager", "`_foreach`", "torch.compile", "one graph"]
    parts = [
        "How many times as long each peer takes, measured in turns in one process:",
        table([*head, "Torch-Pruning", "peak MiB"], rows),
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
            "Scoring ResNet-50 while pruning changes its shapes every step, compilation included:",
            table(["", "steps", "ms a step", "graphs compiled"], steps),
        ]
    cases = results.of("scoring_step")
    if cases:
        labels = [e.label for e in cases[0].entries]
        found = [[case.get(label) for case in cases] for label in labels]
        parts += [
            "A scoring step of ResNet-18, relative to forward + backward alone:",
            table(
                ["", *(case.name[2].replace("x", "×") for case in cases)],
                [
                    [label, *(number(e and e.info["ratio_to_plain"]) for e in each)]
                    for label, each in zip(labels, found, strict=True)
                ],
            ),
        ]
    parts += fisher_report.readme_parts(results)
    source = results.path.as_posix()
    parts.append(f"{machine_line(results)}. Source: `{source}`, written by `make bench`.")
    return "\n\n".join(parts)


def rewrite(readme: Path, block: str, begin: str = BEGIN, end: str = END) -> None:
    """Put a block between two markers of a README.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    text = readme.read_text()
    if len(re.findall(f"{begin}.*?{end}", text, re.DOTALL)) != 1:
        raise ValueError(f"{readme}: needs {begin} and {end}, once each and in this order")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    readme.write_text(f"{head}{begin}\n{block}\n{end}{tail}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of pytest --benchmark-json")
    parser.add_argument("--readme", type=Path, help="a README whose figures to rewrite")
    options = parser.parse_args(arguments)
    results = load(options.results)
    (options.results.parent / "report.md").write_text(report(results))
    draw(results, options.results.parent / "ratios.png")
    fisher_report.draw_batches(results, options.results.parent / "batches.png")
    if options.readme:
        rewrite(options.readme, readme_block(results))
    print(table(["target", "limit", "measured", ""], [t.row() for t in all_targets(results)]))
    print(f"\nWrote {options.results.parent}/report.md and its plots")


if __name__ == "__main__":
    main()
