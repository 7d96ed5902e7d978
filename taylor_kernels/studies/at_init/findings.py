"""What a comparison at initialization says of published statements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from taylor_kernels.studies.at_init.measure import CONTROLS
from taylor_kernels.studies.report import Table

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

PLAIN, SHUFFLED, ANEW = CONTROLS
#: A loss of accuracy that is called little, and the sparsity up to which it is asked for apart.
LITTLE, MODERATE = 0.01, 0.95
#: Of which the literature says that neither the mask within a layer nor the weights matter.
AT_INIT = ("SNIP", "GraSP", "SynFlow")
TICKETS = ("lottery ticket", "lottery ticket, rewound")
HEAD = ["statement", "measured", "holds"]


def methods(points: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(point["method"] for point in points))


def sparsities(points: Sequence[Json]) -> list[float]:
    return sorted({point["sparsity"] for point in points})


def chosen(points: Sequence[Json], method: str, control: str, sparsity: float) -> list[Json]:
    """Of each seed the point."""
    return [
        point
        for point in points
        if (point["method"], point["control"], point["sparsity"]) == (method, control, sparsity)
    ]


def empty_layers(point: Json) -> int:
    """How many layers have no weight left, so that nothing of the input passes."""
    return sum(1 for left in point["left"].values() if left == 0)


def lost(points: Sequence[Json], method: str, control: str, sparsity: float) -> float | None:
    """Accuracy that a control loses of the method's, mean over seeds; None where it has not been
    measured or where a layer is empty, so that nothing is there to be lost."""
    plain = chosen(points, method, PLAIN, sparsity)
    other = chosen(points, method, control, sparsity)
    if not plain or not other or "accuracy" not in plain[0] or any(map(empty_layers, plain)):
        return None
    return mean(point["accuracy"] for point in plain) - mean(point["accuracy"] for point in other)


def findings(points: Sequence[Json]) -> list[list[str]]:
    """Statement, what was measured, and whether it holds here."""
    rows = []
    present = methods(points)
    if "SynFlow" in present and "SNIP" in present:
        rows.append(_collapse(points))
    for method in present:
        little = method in AT_INIT
        if not little and method not in TICKETS:
            continue
        for control, what in ((SHUFFLED, "its mask shuffled within layers"), (ANEW, "new weights")):
            each = {
                s: value
                for s in sparsities(points)
                if (value := lost(points, method, control, s)) is not None
            }
            if each:
                rows.append(_control(method, what, each, little))
    return rows


def findings_table(points: Sequence[Json]) -> Table:
    caption = (
        f"Little: at most {100 * LITTLE:.0f} point at every sparsity, mean over seeds. "
        "Networks with an empty layer, which have nothing to lose, are left out."
    )
    return Table(HEAD, findings(points), caption, numeric=())


def _collapse(points: Sequence[Json]) -> list[str]:
    most = sparsities(points)[-1]
    worst = {
        method: max(map(empty_layers, chosen(points, method, PLAIN, most)))
        for method in ("SNIP", "SynFlow")
    }
    number = len(points[0]["left"])
    if worst["SynFlow"]:
        holds = "no"
    else:
        holds = "yes" if worst["SNIP"] else "SynFlow keeps all, but so does SNIP"
    return [
        "SynFlow leaves no layer empty where SNIP does",
        f"at {percent(most)}: SNIP {worst['SNIP']}, SynFlow {worst['SynFlow']} of {number} layers "
        "empty",
        holds,
    ]


def _control(method: str, what: str, each: dict[float, float], little: bool) -> list[str]:
    parts = (
        (f"to {percent(MODERATE)}", [value for s, value in each.items() if s <= MODERATE]),
        ("above", [value for s, value in each.items() if s > MODERATE]),
    )
    measured = "; ".join(
        f"{where} {100 * min(values):.1f} to {100 * max(values):.1f} points"
        for where, values in parts
        if values
    )
    above = [s for s, value in each.items() if value > LITTLE]
    if little:
        words = f"{method} loses little by {what}"
        holds = "yes" if not above else f"not at {', '.join(map(percent, above))}"
    else:
        words = f"{method} loses more than a little by {what}"
        holds = "no" if not above else f"at {', '.join(map(percent, above))}"
        if len(above) == len(each):
            holds = "yes"
    return [words, measured, holds]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"
