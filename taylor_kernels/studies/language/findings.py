"""What a result says: perplexities, the sizes that they are of, and which criterion comes first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

#: What is compared: Taylor scores with the two others.
FAMILIES = ("Taylor", "magnitude", "random")
#: As pruned, and after training on: the keys of a cell.
STAGES = {"bits": "as pruned", "recovered": "trained on"}


def chosen(result: Json, kind: str, fraction: float, criterion: str) -> list[Json]:
    """The cells, one for each draw."""
    wanted = (kind, fraction, criterion)
    return [c for c in result["cells"] if (c["kind"], c["fraction"], c["criterion"]) == wanted]


def bits(result: Json, kind: str, fraction: float, criterion: str, stage: str) -> float:
    """Mean bits a byte over the draws."""
    return mean(cell[stage] for cell in chosen(result, kind, fraction, criterion))


def sizes(result: Json, kind: str, fraction: float) -> dict[str, list[float]]:
    """Criterion -> the shares of the parameters that are left, one for each draw."""
    dense = result["dense"]["parameters"]
    return {
        name: [cell["parameters"] / dense for cell in chosen(result, kind, fraction, name)]
        for name in result["settings"]["criteria"]
    }


def in_percent(shares: Sequence[float]) -> str:
    """Their range in whole percents; one number where that is one."""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low}–{high}%"


def unequal(result: Json, kind: str, fraction: float) -> dict[str, str]:
    """Criterion -> the share of the parameters that is left; empty where it is the same of all.

    Whole units go, and a branch is a large one, of attention another than of a feed-forward layer.
    """
    found = {name: in_percent(each) for name, each in sizes(result, kind, fraction).items()}
    return found if len(set(found.values())) > 1 else {}


def perplexity(bits_a_byte: float) -> str:
    """Of a byte, 2 to its bits."""
    value = 2**bits_a_byte
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def family(criterion: str) -> str:
    """Taylor, magnitude or random; any other by its own name."""
    for start, name in (("taylor", "Taylor"), ("magnitude", "magnitude")):
        if criterion.startswith(start):
            return name
    return criterion


def one_of_each(criteria: Sequence[str]) -> dict[str, str]:
    """Family -> the first criterion of it, of the families that are compared."""
    found: dict[str, str] = {}
    for criterion in criteria:
        if family(criterion) in FAMILIES:
            found.setdefault(family(criterion), criterion)
    return {name: found[name] for name in FAMILIES if name in found}


def remarks(result: Json) -> list[str]:
    """A sentence or two for each kind at its largest fraction, and on which criterion is first."""
    settings = result["settings"]
    fraction = settings["fractions"][-1]
    said = []
    for kind in settings["kinds"]:
        parts = []
        for stage, words in STAGES.items():
            found = {
                name: bits(result, kind, fraction, name, stage) for name in settings["criteria"]
            }
            values = ", ".join(f"`{n}` {perplexity(b)}" for n, b in found.items())
            parts.append(f"{words.capitalize()}: {values}. {_order(result, kind, stage)}".strip())
        if shares := unequal(result, kind, fraction):
            each = ", ".join(f"`{name}` {share}" for name, share in shares.items())
            parts.append(f"Not models of one size; of the parameters are left: {each}.")
        said.append(f"**{kind}, {fraction:.0%} gone.** {' '.join(parts)}")
    return said


def _order(result: Json, kind: str, stage: str) -> str:
    """Taylor scores beside the others, and these beside each other where random ones are better."""
    cell = (kind, result["settings"]["fractions"][-1])
    names = one_of_each(result["settings"]["criteria"])
    said: dict[str, list[str]] = {}
    for one, other in combinations(names.values(), 2):
        gap = _gap(result, *cell, one, other, stage)
        if gap == 0 or (gap > 0 and family(one) != "Taylor"):
            continue
        ahead, behind = (one, other) if gap > 0 else (other, one)
        chance = " (within the range of draws)" if near(result, *cell, one, other, stage) else ""
        said.setdefault(ahead, []).append(f"`{behind}` by {abs(gap):.2f} bits{chance}")
    return " ".join(f"`{name}` is better than {' and '.join(each)}." for name, each in said.items())


def _gap(result: Json, kind: str, fraction: float, one: str, other: str, stage: str) -> float:
    """Bits a byte that the other criterion is worse by."""
    return bits(result, kind, fraction, other, stage) - bits(result, kind, fraction, one, stage)


def near(result: Json, kind: str, fraction: float, one: str, other: str, stage: str) -> bool:
    """Whether the ranges that the draws of two criteria have meet."""
    each = [[c[stage] for c in chosen(result, kind, fraction, name)] for name in (one, other)]
    return max(map(min, each)) <= min(map(max, each))


def cells(result: Json) -> list[tuple[str, float]]:
    """Every kind and fraction."""
    settings = result["settings"]
    return [(kind, fraction) for kind in settings["kinds"] for fraction in settings["fractions"]]


def better(result: Json, one: str, other: str, stage: str) -> list[tuple[str, float]]:
    """Kind and fraction of the cells in which the one criterion is better than the other."""
    return [cell for cell in cells(result) if _gap(result, *cell, one, other, stage) > 0]
