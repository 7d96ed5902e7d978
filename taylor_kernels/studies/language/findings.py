"""What a result says: perplexities, their order, and where it is not that of image networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taylor_kernels.studies.results import Json

#: Bits a byte, 1.4% of perplexity, below which two criteria are called alike. How far another dense
#: model would move them is not known: there is one.
ALIKE = 0.02
#: The order of the study on digits with half of the filters gone and no training in between. There
#: magnitude and random are both near chance; that Taylor is before them is what is sure of it.
IMAGES = ("Taylor", "magnitude", "random")
#: As pruned, and after training on: the keys of a cell.
STAGES = {"bits": "as pruned", "recovered": "trained on"}


def chosen(result: Json, kind: str, fraction: float, criterion: str) -> list[Json]:
    """The cells, one for each draw."""
    wanted = (kind, fraction, criterion)
    return [c for c in result["cells"] if (c["kind"], c["fraction"], c["criterion"]) == wanted]


def bits(result: Json, kind: str, fraction: float, criterion: str, stage: str) -> float:
    """Mean bits a byte over the draws."""
    return mean(cell[stage] for cell in chosen(result, kind, fraction, criterion))


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
    """Family -> the first criterion of it, of the families that image networks have an order of."""
    found: dict[str, str] = {}
    for criterion in criteria:
        if family(criterion) in IMAGES:
            found.setdefault(family(criterion), criterion)
    return {name: found[name] for name in IMAGES if name in found}


def remarks(result: Json) -> list[str]:
    """A sentence or two for each kind at its largest fraction, and on the order of criteria."""
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
            order = _order(settings["criteria"], found)
            parts.append(f"{words.capitalize()}: {values}. {order}".strip())
        said.append(f"**{kind}, {fraction:.0%} gone.** {' '.join(parts)}")
    return said


def _order(criteria: Sequence[str], found: dict[str, float]) -> str:
    """How an order compares with that of image networks."""
    names = one_of_each(criteria)
    if len(names) < 2:
        return ""
    other, alike = [], []
    for better, worse in combinations(names.values(), 2):
        gap = found[worse] - found[better]
        if abs(gap) <= ALIKE:
            alike.append(f"`{better}` and `{worse}`")
        elif gap < 0:
            other.append(f"`{worse}` is better than `{better}` by {-gap:.2f} bits")
    parts = []
    if other:
        parts.append(f"Not the order of image networks: {'; '.join(other)}.")
    if alike:
        parts.append(f"Alike: {'; '.join(alike)}.")
    return " ".join(parts) or "The order of image networks."


def differences(result: Json, stage: str) -> list[tuple[str, float]]:
    """Kind and fraction of the cells in which the order is not that of image networks."""
    settings = result["settings"]
    found = []
    for kind in settings["kinds"]:
        for fraction in settings["fractions"]:
            values = [
                bits(result, kind, fraction, name, stage)
                for name in one_of_each(settings["criteria"]).values()
            ]
            if any(b - a < -ALIKE for a, b in combinations(values, 2)):
                found.append((kind, fraction))
    return found
