"""What moments, gates, calls and gate scores are held against; fisher_report.py has the others."""

from __future__ import annotations

from collections.abc import Iterator

from bench.figures import OPS, Case, PerformanceTarget, Results

#: (op, rows, both or a layout, dtype): ns an element in cache, one thread.
IN_CACHE = {
    ("filter_moments", "rows", "fp32"): 0.35,
    ("filter_moments", "both", "fp32"): 0.6,
    ("filter_moments", "rows", "bf16"): 0.4,
    ("second_order_moments", "rows", "fp32"): 0.45,
    ("gate_gradients", "nchw", "fp32"): 0.2,
}
#: What a call may take beside its sums, in µs, by the number of parameters.
CALL = {"54 parameters": 20.0, "2000 parameters": 300.0}
#: What choosing among 10⁵ units may take, in ms.
SELECTION = 20.0
#: The sets of the CPU that others than `ours` may run in the same rounds.
LOWER = ("avx2",)


def targets(results: Results) -> list[PerformanceTarget]:
    """All of them, of whatever cases there are."""
    found: list[PerformanceTarget] = []
    for case in results.of("filter_moments"):
        if case.ours is not None and case.name[2] != "cols":
            found += _of_moments(case)
    for case in results.of("in_cache"):
        found += _in_cache(case)
    for case in results.of("call"):
        found += _of_call(case)
    for case in results.of("selection"):
        if case.ours:
            what = f"selection among 100 000 units, {case.name[1]}"
            found.append(PerformanceTarget(what, SELECTION, 1e3 * case.ours.median, unit=" ms"))
    found += _peaks(results)
    for case in results.of("scoring_step"):
        if case.ours:
            what = f"{' '.join(case.name)}: scoring over forward + backward"
            found.append(PerformanceTarget(what, 0.8, case.ours.info["ratio_to_plain"]))
    return found


def _sets(case: Case) -> Iterator[tuple[str, float]]:
    """What tells our kernels of each instruction set apart, and their medians."""
    if case.ours is None:
        return
    isa = case.ours.info.get("isa")
    yield f" ({isa})" if isa else "", case.ours.median
    for lower in LOWER:
        entry = case.get(f"ours ({lower})")
        if entry is not None:
            yield f" ({lower})", entry.median


def _of_moments(case: Case) -> Iterator[PerformanceTarget]:
    rows = case.name[2] == "rows"
    floor, eager = case.fastest(role="floor"), case.fastest(family="eager")
    for isa, median in _sets(case):
        where = " ".join(case.name) + isa
        if floor:
            limit = 1.15 if rows else 1.5
            yield PerformanceTarget(f"{where}: time over read floor", limit, median / floor.median)
        if eager and rows:
            what = f"{where}: faster than eager"
            yield PerformanceTarget(what, 4.0, eager.median / median, True)
        for label, limit in (
            ("torch.compile", 1.1 if rows else 1.3),
            ("torch.compile, one graph", 1.0 if rows else 1.3),
        ):
            compiled = case.get(label)
            if compiled is not None:
                what = f"{where}: faster than {label}"
                yield PerformanceTarget(what, limit, compiled.median / median, True)


def _in_cache(case: Case) -> Iterator[PerformanceTarget]:
    limit = IN_CACHE.get((case.name[1], case.name[2], case.name[3]))
    compiled = case.fastest(family="torch.compile")
    if limit is None or case.ours is None:
        return
    for isa, median in _sets(case):
        where = f"in cache, {' '.join(case.name[1:])}{isa}"
        element = 1e9 * median / case.ours.info["elements"]
        yield PerformanceTarget(f"{where}: an element", limit, element, unit=" ns")
        if compiled is not None:
            what = f"{where}: faster than torch.compile"
            yield PerformanceTarget(what, 1.0, compiled.median / median, True)


def _of_call(case: Case) -> Iterator[PerformanceTarget]:
    kernel, limit = case.fastest(role="floor"), CALL.get(case.name[1])
    if kernel is None or limit is None:
        return
    for label, how in (("ours", "a list of tables"), ("ours, packed", "one packed table")):
        entry = case.get(label)
        if entry is not None:
            what = f"a call on {case.name[1]}, {how}: beside its sums"
            own = 1e6 * (entry.median - kernel.median)
            yield PerformanceTarget(what, limit, own, unit=" µs")


def _peaks(results: Results) -> Iterator[PerformanceTarget]:
    for op in OPS:
        peaks = [
            (case.ours.info["peak_mib"], case)
            for case in results.of(op)
            if case.ours and case.ours.info["peak_mib"] is not None
        ]
        if peaks:
            peak, case = max(peaks, key=lambda pair: pair[0])
            what = f"{op}: peak memory beyond inputs and outputs (worst: {' '.join(case.name[1:])})"
            yield PerformanceTarget(what, 2.0, peak, unit=" MiB")
