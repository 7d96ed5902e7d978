"""What report.md says of the doors into other libraries: a table and targets for each."""

from __future__ import annotations

from bench.figures import Case, PerformanceTarget, Results
from bench.markdown import TIMING, number, table, timing

#: What is measured of Torch-Pruning: how many times as fast ours must be.
FASTER = {"taylor": 3.0, "hessian": 10.0, "obdc": 5.0}
#: The extra memory of its Taylor sweep that ours may take, in percent.
MEMORY = 5.0
#: The memory of a diagonal beyond a training step's, over the parameters'.
BEYOND_A_STEP = 2.0
DOORS = ("torch_pruning", "laplace", "backpack")


def targets(results: Results) -> list[PerformanceTarget]:
    """Time of the others over ours, and memory."""
    found = _of_torch_pruning(results)
    for case in (*results.of("laplace"), *results.of("backpack")):
        where, ours, theirs = " ".join(case.name), case.ours, case.fastest(role="peer")
        if ours is not None and theirs is not None:
            faster = theirs.median / ours.median
            found.append(PerformanceTarget(f"{where}: faster than its own", 1.0, faster, True))
        if (beyond := beyond_a_step(case, "ours")) is not None:
            what = f"{where}: memory beyond a step, over the parameters"
            found.append(PerformanceTarget(what, BEYOND_A_STEP, beyond))
    return found


def beyond_a_step(case: Case, label: str) -> float | None:
    """A provider's peak less that of a training step, over the parameters' bytes."""
    peaks = [e and e.info["peak_mib"] for e in (case.get(label), case.get("plain"))]
    if peaks[0] is None or peaks[1] is None:
        return None
    return (peaks[0] - peaks[1]) / case.entries[0].info["parameters_mib"]


def _of_torch_pruning(results: Results) -> list[PerformanceTarget]:
    found = []
    for case in results.of("torch_pruning"):
        ours, theirs = case.ours, case.fastest(role="peer")
        if ours is None or theirs is None:
            continue
        where, kind = " ".join(case.name), case.name[1]
        faster = theirs.median / ours.median
        found.append(PerformanceTarget(f"{where}: faster than its own", FASTER[kind], faster, True))
        share = memory_share(case)
        if kind == "taylor" and share is not None:
            what = f"{where}: extra memory over its own"
            found.append(PerformanceTarget(what, MEMORY, 100 * share, unit="%"))
    return found


def memory_share(case: Case) -> float | None:
    """Our peak over the peer's; None where either was not measured."""
    ours, theirs = case.ours, case.fastest(role="peer")
    peaks = [e and e.info["peak_mib"] for e in (ours, theirs)]
    if peaks[0] is None or not peaks[1]:
        return None
    return peaks[0] / peaks[1]


def parts(results: Results) -> list[str]:
    """Sections of report.md."""
    found = []
    for case in (case for door in DOORS for case in results.of(door)):
        rows = [
            [
                *timing(e),
                number(e.info["ratio_to_ours"]),
                number(e.info["peak_mib"], "{:.1f}"),
                number(e.info["error"], "{:.0e}"),
            ]
            for e in case.entries
        ]
        head = ["provider", *TIMING, "× ours", "peak MiB", "error"]
        found += [f"## {' · '.join(case.name)}", table(head, rows)]
    return found
