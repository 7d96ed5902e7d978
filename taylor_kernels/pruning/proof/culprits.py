"""Which of many are to blame for a fault that all of them together show, in few trials.

The blocks of a network repeat: what is wrong with the heads of one attention is wrong with those of
all others. So numbers are tried in sets of such as are made alike, and of a faulty set a few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import takewhile

from taylor_kernels.tracing import Group

#: Says what is wrong with these numbers together; "" if nothing.
Fault = Callable[[Sequence[int]], str]

#: Of a faulty set as large as this some are tried, and all others only if one of these is sound.
_MANY = 6
#: So many sets are tried first. Queries and keys are not among what the layer behind an attention
#: reads, but in the same module.
_SUSPECTS = 3


def culprits(fault: Fault, sets: Sequence[Sequence[int]], known: str = "") -> dict[int, str]:
    """Numbers to blame -> the reason; none if they are sound together.

    Each half of them may be sound, and both together not: all are to blame then.

    Args:
        sets: numbers in sets of such as are alike.
        known: what is wrong with all of them together, where it has been tried.
    """
    numbers = [number for alike in sets for number in alike]
    reason = known or (fault(numbers) if numbers else "")
    if not reason or len(numbers) == 1:
        return dict.fromkeys(numbers, reason) if reason else {}
    if len(sets) == 1:
        if len(numbers) >= _MANY and all(map(fault, ([n] for n in _some_of(numbers)))):
            return dict.fromkeys(numbers, reason)
        sets = [[number] for number in numbers]
    half = len(sets) // 2
    found = culprits(fault, sets[:half]) | culprits(fault, sets[half:])
    return found or dict.fromkeys(numbers, reason)


def _some_of(numbers: Sequence[int]) -> list[int]:
    """Both ends, and neighbours, as layers of two kinds may take turns."""
    return [numbers[0], numbers[1], numbers[-1]]


def made_alike(groups: Sequence[Group], numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of groups in sets of those that run through the same layers of repeated modules,
    as wide, in order."""
    sets: dict[object, list[int]] = {}
    for number in numbers:
        group = groups[number]
        slots = [(_place(slot.owner), slot.side, slot.index.size(1)) for slot in group.slots]
        sets.setdefault((group.size, *slots), []).append(number)
    return list(sets.values())


def suspects(
    groups: Sequence[Group], sets: Sequence[Sequence[int]], place: str | None
) -> list[Sequence[int]]:
    """The sets to try first where a trial has failed in a module, or a layer was the first to show
    a difference: those of groups with layers in it or next to it, of equals the ones with the
    fewest layers; none if that leaves no others.

    Args:
        place: the name of the module or layer, if it is known.
    """
    if not place or len(sets) < 2:
        return []
    path = place.split(".")

    def near(number: int) -> int:
        return max(_common(slot.owner.split("."), path) for slot in groups[number].slots)

    ranked = sorted(
        (-max(map(near, alike)), len(groups[alike[0]].slots), count)
        for count, alike in enumerate(sets)
    )
    return [sets[count] for depth, _, count in ranked[:_SUSPECTS] if depth < 0]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many names two paths have in common from the start."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _place(layer: str) -> str:
    """A layer's name without the numbers of the modules that it is in."""
    modules, _, own = layer.rpartition(".")
    return re.sub(r"\d+", "*", modules) + "." + own
