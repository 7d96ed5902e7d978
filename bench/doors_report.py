"""What report.md says of the doors into other libraries: a table and targets for each."""

from __future__ import annotations

from bench.figures import Case, PerformanceTarget, Results
from bench.markdown import TIMING, number, table, timing

#: How many times as fast as the library's own way ours must be, by the cases of a door's bench.
FASTER = {
    ("torch_pruning", "taylor"): 3.0,
    ("torch_pruning", "hessian"): 10.0,
    ("torch_pruning", "obdc"): 5.0,
    **{("laplace", f"{kind}-{net}"): 1.0 for kind in ("ef", "ggn") for net in ("resnet18", "vit")},
    **{
        ("backpack", f"{kind}-{net}"): 1.0
        for kind in ("sum_grad_squared", "batch_l2")
        for net in ("convnet", "resnet18")
    },
}
#: The memory of a diagonal beyond a training step's, over the parameters'.
BEYOND_A_STEP = 2.0
#: The share of the library's own extra memory that ours may take, in percent.
MEMORY = {("torch_pruning", "taylor"): 5.0}
#: The doors that have a bench, in the order of the report.
BENCHES = ("torch_pruning", "avalanche")


def targets(results: Results) -> list[PerformanceTarget]:
    """Time of the library's own way over ours, and the memory of ours over it."""
    found = []
    for case in _cases(results):
        ours, theirs = case.ours, case.fastest(role="peer")
        if ours is None or theirs is None:
            continue
        where = " ".join(case.name)
        if case.name in FASTER:
            what, ratio = f"{where}: faster than its own", theirs.median / ours.median
            found.append(PerformanceTarget(what, FASTER[case.name], ratio, True))
        share = memory_share(case)
        if case.name in MEMORY and share is not None:
            what = f"{where}: extra memory over its own"
            found.append(PerformanceTarget(what, MEMORY[case.name], 100 * share, unit="%"))
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
    for case in _cases(results):
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


def _cases(results: Results) -> list[Case]:
    return [case for bench in BENCHES for case in results.of(bench)]
