"""Turns a results file into a table of targets, a Markdown report and plots.

python -m bench.report bench/results/cpu/latest.json     # beside it: report.md, *.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import doors_report, fisher_report
from bench.figures import OPS, Case, PerformanceTarget, Results, load
from bench.markdown import TIMING, host_ms, ms, number, table, timing
from bench.plot import draw
from bench.targets import targets


def _op_table(case: Case, on_gpu: bool) -> str:
    speed = "percent_of_copy" if on_gpu else "percent_of_floor"
    rows = [
        [
            *timing(e),
            host_ms(e) if on_gpu else e.info.get("isa") or "",
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
    where = "host ms" if on_gpu else "set"
    head = ["provider", *TIMING, where, "× floor", "× ours"]
    return table([*head, "GB/s", share, "peak MiB", "error", "first call s"], rows)


def _in_cache_table(case: Case) -> str:
    rows = [
        [
            e.label,
            e.info.get("isa") or "",
            number(1e9 * e.median / e.info["elements"], "{:.3f}"),
            number(e.info["ratio_to_ours"]),
            number(e.info["error"], "{:.1f}"),
        ]
        for e in case.entries
    ]
    return table(["provider", "set", "ns an element", "× ours", "error"], rows)


def _call_table(case: Case) -> str:
    rows = [
        [*timing(e), number(e.info["ratio_to_floor"]), number(e.info["error"], "{:.1f}")]
        for e in case.entries
    ]
    return table(["what", *TIMING, "× kernel alone", "error"], rows)


def _selection_table(case: Case) -> str:
    rows = [[*timing(e), number(e.info["ratio_to_floor"])] for e in case.entries]
    return table(["what", *TIMING, "× sort"], rows)


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
            *timing(e),
            number(e.info["ratio_to_plain"]),
            number(e.info["peak_mib"], "{:.0f}"),
        ]
        for e in case.entries
    ]
    head = ["step", *TIMING, "× forward + backward", "peak MiB"]
    return table(head, rows)


def all_targets(results: Results) -> list[PerformanceTarget]:
    """What the project set out to reach, from whatever cases the file holds."""
    return targets(results) + fisher_report.targets(results) + doors_report.targets(results)


def machine_line(results: Results) -> str:
    m = results.machine
    processor = m.get("gpu") or f"{m['cpu']['brand_raw']}, {m['isa']}, {m['threads']} threads"
    runs = results.runs
    if len(runs) > 1:  # the machine is that of the last, and tables say which is whose
        processor = f"The last run on {processor}"
        runs = [f"run {number}: {run}" for number, run in enumerate(runs, 1)]
    return (
        f"{processor}; PyTorch {m['torch']}, Python {m['python_version']}, {m['compiler']}; "
        f"{'; '.join(runs)}"
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
        "in_cache": _in_cache_table,
        "call": _call_table,
        "selection": _selection_table,
        "pruning_sequence": _sequence_table,
        "scoring_step": _step_table,
    }
    for bench, make in how.items():
        for case in results.of(bench):
            run = f"Run {results.number_of(case)}: {case.run}."
            parts += [f"## {' · '.join(case.name)}", run, make(case)]
    parts += fisher_report.parts(results)
    parts += doors_report.parts(results)
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of pytest --benchmark-json")
    options = parser.parse_args(arguments)
    results = load(options.results)
    (options.results.parent / "report.md").write_text(report(results))
    draw(results, options.results.parent / "ratios.png")
    fisher_report.draw_batches(results, options.results.parent / "batches.png")
    print(table(["target", "limit", "measured", ""], [t.row() for t in all_targets(results)]))
    print(f"\nWrote {options.results.parent}/report.md and its plots")


if __name__ == "__main__":
    main()
