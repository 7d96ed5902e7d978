"""Which units the proof removes from a group, step after step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise

import torch
from torch import Tensor

from taylor_kernels.pruning.choosing.groups import Group, by_schedule

#: One for each way to choose units.
STEPS = 3
#: So many channels are masked in no group, as far as it has them: a norm over two only tells which
#: is greater, and over one nothing.
_AT_WORK = 3
#: Of more counts, a step can take some in each way and groups of one size still differ.
_FEW = 4
#: Groups of as many units or fewer are mostly heads, and layers with as many of them take turns.
_HEADS = 5


def steps_of_groups(groups: Sequence[Group]) -> list[Tensor]:
    """For each group the units of it that are removed in each step: [steps, U] bool. Those of a
    stage go in step with each other.

    Of few units those of one size are counted through; those of others begin elsewhere, since of a
    width and a number of heads that become smaller in step code may work out the same quotient.
    """
    counted: Counter[int] = Counter()
    found = []
    for number, group in enumerate(groups):
        few = group.size <= _HEADS
        own = group.size + counted[group.size] if few else number
        found.append(units_by_step(group, own))
        counted[group.size] += 1
    for schedule, numbers in by_schedule(groups):
        steps = schedule.steps()
        sizes = steps.sum(1)
        last = max(int((3 * sizes >= sizes[0]).sum()) - 1, min(1, len(sizes) - 1))
        drawn = random.Random(numbers[0])
        lost = steps[0] - steps[[*sorted(drawn.choices(range(1, last + 1), k=STEPS - 1)), last]]
        for number in numbers:
            counts = lost[:, groups[number].kind].tolist()
            found[number] = _in_ways(groups[number].size, number, counts, drawn)
    return found


def steps_to_the_least(groups: Sequence[Group], cut: Tensor) -> list[Tensor]:
    """The same for a trial of its own, that of groups whose channels lie beside such that stay:
    all units that may go, in one step. None of other groups.

    Args:
        cut: [classes] bool, as `Channels.cut_beside_kept`.
    """
    found = []
    for number, group in enumerate(groups):
        beside = group.schedule is None and bool(cut[group.classes].any())
        most = group.most_removable(group.size) if beside else 0
        found.append(_in_ways(group.size, number, [most], random.Random(number)))
    return found


def units_by_step(group: Group, number: int) -> Tensor:
    """The units of a group that are removed in each step: [steps, U] bool.

    Two thirds of them in all: the fewer are left of what was masked, the further have the others
    moved from their places. Of more than a few, an odd number of bundles is left: code that halves
    a width, or takes a third of it, rounds it otherwise then. An odd number is gone after one step
    at least and an even one after another, as far as there are such. How many go in a step differs
    between groups of one size, since code may take the width of one for another's.

    Args:
        number: another one for each group of its size.
    """
    drawn = random.Random(number)
    if not (first := group.next_to_go(group.size)):
        return torch.zeros(STEPS, group.size, dtype=torch.bool)
    most = min(group.size * 2 // 3, group.size - -(-_AT_WORK // group.filters_per_unit))
    most = min(max(most, first), group.most_removable(group.size))
    counts = [0, *range(first, most + 1, group.multiple)]
    while len(counts) > _FEW and not _is_telling(group.size - counts[-1], group):
        del counts[-1]
    few = group.size <= _HEADS
    chosen = _dealt_out(counts, number) if few else _drawn(counts, number, drawn)
    return _in_ways(group.size, number, chosen, drawn)


def _is_telling(left: int, group: Group) -> bool:
    """Whether few fractions that code may take are what they were with so many units left: no even
    number of bundles; and of heads no third, as about a third is left of wide groups, and a width
    by a number of heads should be another one."""
    heads = group.filters_per_unit > 1
    return left // group.multiple % 2 == 1 and not (heads and 3 * left == group.size)


def _in_ways(size: int, number: int, counts: Sequence[int], drawn: random.Random) -> Tensor:
    """So many units are gone after each step, in one the first of those that are left, in one the
    last, in one any of them: [steps, U] bool."""
    gone = torch.zeros(STEPS, size, dtype=torch.bool)
    left, before = list(range(size)), 0
    for step, count in enumerate(counts):
        going, before = count - before, count
        way = (number + step) % STEPS
        if way == 0:
            chosen, left = left[:going], left[going:]
        elif way == 1:
            chosen, left = left[len(left) - going :], left[: len(left) - going]
        else:
            chosen = drawn.sample(left, going)
            left = sorted(set(left).difference(chosen))
        gone[step, chosen] = True
    return gone


def _drawn(counts: Sequence[int], number: int, drawn: random.Random) -> tuple[int, int, int]:
    """How many units have gone after each step, of so many as may have gone."""
    if len(counts) > _FEW:
        *every, last = counts[1:]
        place = number % (len(every) - 1)
        later = every[place + 1 :]
    else:
        every, last = [*counts], counts[-1]
        place = (number + 1) % max(len(every) - 1, 1)
        later = every[place:]
    first = every[place]
    other = [n for n in later if n and (n - last) % 2]
    if len(counts) > _FEW:  # as many from either end would leave the middle where it was
        uneven = [n for n in other or later if _from_either_end((first, n, last), number)]
        other = uneven or other
    return first, drawn.choice(other or later), last


def _from_either_end(counts: tuple[int, int, int], number: int) -> int:
    """How many more of the first units than of the last ones `_in_ways` takes."""
    going = [after - before for before, after in pairwise((0, *counts))]
    return going[-number % STEPS] - going[(1 - number) % STEPS]


def _dealt_out(counts: Sequence[int], number: int) -> tuple[int, int, int]:
    """The same of so few that all ways are known: one after the other, so that groups that lie any
    distance apart in their row do not have the same one for long."""
    last = counts[-1]
    odd = any(n and (n - last) % 2 for n in counts)
    ways = [
        (one, two)
        for one, two in combinations_with_replacement(counts, 2)
        if not odd or any(n and (n - last) % 2 for n in (one, two))
    ]
    random.Random(7 * last).shuffle(ways)  # one order of many
    return (*ways[(number + number // len(ways) ** 2) % len(ways)], last)


def all_have_lost(gone: Sequence[Tensor], masked: Sequence[Tensor]) -> bool:
    """Whether every group that has units masked has had some removed."""
    pairs = zip(gone, masked, strict=True)
    return all(bool(lost.any()) for lost, units in pairs if units.any())
