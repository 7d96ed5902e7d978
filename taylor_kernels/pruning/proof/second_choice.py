"""A second choice for groups that the proof refuses.

A reshape leaves a choice of axes: heads may go whole, or the same positions of every head. What a
run shows is not always enough to make it: a number of heads that a config holds is written down in
no module, and a scale may be computed from the width of a head. Where the proof refuses a group,
the reshapes that cut it shrink along other axes, as long as there are any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.tracing import Channels

#: Channels, the groups of them that can be pruned, and the layers that cannot -> why.
Offer = tuple[Channels, list[Group], dict[str, str]]
#: What is made of an offer by a proof: an offer, and the groups of it that are not sound -> why.
Proven = tuple[Offer, dict[int, str]]
#: So many other choices are tried at most, and none is begun after so much time.
_MOST, _SECONDS = 3, 60.0


def best_choice(
    prove: Callable[[Channels, Offer], Proven],
    whole: Channels,
    offer: Offer,
    model: nn.Module,
    choose: Callable[[Channels], tuple[list[Group], dict[str, str]]],
) -> Proven:
    """The choice of axes that leaves most filters in sound groups; of equals the first.

    Args:
        prove: tries the groups of an offer, given the channels that they are of.
        whole: the channels that `offer` is of.
        choose: the groups of channels that can be pruned, and why other layers cannot.
    """
    until = time.monotonic() + _SECONDS
    tried = best = prove(whole, offer)
    for _ in range(_MOST):
        (channels, groups, _skipped), found = tried
        if not found or time.monotonic() > until:
            break
        other = channels.otherwise(model, [groups[number].classes for number in found])
        if other is None:
            break
        more, skipped = choose(other)
        if sound_filters(more, {}) <= sound_in(best):
            break
        tried = prove(other, (other.offering(more), more, skipped))
        if sound_in(tried) > sound_in(best):
            best = tried
    return best


def offer_in_stages(
    channels: Channels,
    offer: Offer,
    model: nn.Module,
    choose: Callable[[Channels], tuple[list[Group], dict[str, str]]],
) -> Offer | None:
    """What can be pruned where the channels of stages of shuffles change places; None where there
    are none, or that would be less.

    Args:
        channels: that `offer` is of.
        model: the traced model or a copy of it.
        choose: as of `best_choice`.
    """
    other = channels.rearranged(model)
    if other is None:
        return None
    groups, skipped = choose(other)
    fewer = sound_filters(groups, {}) < sound_filters(offer[1], {})
    if fewer or all(group.schedule is None for group in groups):
        return None
    return other.offering(groups), groups, skipped


def best_in_stages(staged: Offer, proven: Proven, holds: Callable[[Channels], bool]) -> Proven:
    """What is left of an offer in stages without the groups in whose layers a proof of another
    offer has found faults, if it holds and is more; else what was proven.

    Args:
        holds: whether all groups of channels are sound together.
    """
    (_, groups, _), found = proven
    wrong = {slot.owner: why for n, why in found.items() for slot in groups[n].producers}
    channels, more, skipped = staged
    kept = [
        group
        for group in more
        if group.schedule is not None or not any(slot.owner in wrong for slot in group.producers)
    ]
    if len(kept) == len(more) or sound_filters(kept, {}) <= sound_in(proven):
        return proven
    left = channels.offering(kept)
    return ((left, kept, skipped | wrong), {}) if holds(left) else proven


def sound_in(proven: Proven) -> int:
    """The filters that are left to prune."""
    (_, groups, _), found = proven
    return sound_filters(groups, found)


def sound_filters(groups: Sequence[Group], found: Mapping[int, str]) -> int:
    """The filters of the groups in which no fault was found."""
    return sum(g.size * g.filters_per_unit for n, g in enumerate(groups) if n not in found)
