"""Proof on a copy that masking a group equals removing it.

What a trace says holds for what ran; code may depend on widths in ways that no run shows (a width
written into a forward method, an attribute that counts channels under a name of its own). So every
group is tried: some of its units are masked, the outputs kept, the same units removed, and the
outputs compared in float64, those of the layers too, since what comes behind may hide from the
model's own what has gone wrong. A group that differs, or breaks the model, is not pruned.

The units that are masked in one run are removed in steps, in each the first ones of some groups,
the last ones of others, and any of the rest; after each step the others are still masked, and the
outputs the same. So a run with masks serves several removals, and what is left is masked and pruned
as in a network that has been compacted. (Code that splits channels at half of their number would
pass with a balanced choice.) All groups are tried at once; only where that fails are the ones to
blame looked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from taylor_kernels.pruning.proof.culprits import culprits, made_alike, suspects
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.tracing import Block

#: After so much time no further step is tried, and groups that have passed none are left out.
SECONDS = 120.0


class Fault(NamedTuple):
    """What a trial has found.

    Attributes:
        reason: what is wrong; "" if nothing.
        place, layer: as of `Trial`.
    """

    reason: str
    place: str | None = None
    layer: str | None = None


_NONE = Fault("")


def sound_blocks(trial: Trial, blocks: Sequence[Block]) -> tuple[list[Block], dict[str, str]]:
    """The residual blocks whose removal is what masking them is, and block -> reason for others.

    A module that is nothing but the block becomes the identity; where the model asks more of it,
    the modules inside are tried.
    """
    chosen, found = list(blocks), _unsound_blocks(trial, blocks)
    if any(chosen[n].places != chosen[n].open_places for n in found):
        chosen = [block.opened() if n in found else block for n, block in enumerate(chosen)]
        found = _unsound_blocks(trial, chosen)
    reasons = {chosen[number].name: reason for number, reason in found.items()}
    return [block for number, block in enumerate(chosen) if number not in found], reasons


def _unsound_blocks(trial: Trial, blocks: Sequence[Block]) -> dict[int, str]:
    found: dict[int, str] = {}
    while tried := [[number] for number in range(len(blocks)) if number not in found]:
        blamed = culprits(partial(trial.fault_of_blocks, blocks), tried)
        if not blamed:
            break
        found |= blamed
    return found


def first_fault(trial: Trial, blocks: Sequence[Block] = ()) -> Fault:
    """What is wrong with removing units of all groups at once.

    Args:
        blocks: as of `unsound`.
    """
    numbers, until = range(len(trial.channels.groups)), time.monotonic() + SECONDS
    for gone in _without(blocks):
        if time.monotonic() > until and gone:
            break
        if reason := _fault_in_time(trial, until, gone, numbers):
            return Fault(reason, trial.place, trial.layer)
    return _NONE


def unsound(trial: Trial, blocks: Sequence[Block] = (), known: Fault = _NONE) -> dict[int, str]:
    """The numbers of the groups whose removal is not what masking them is, with the reason.

    Args:
        blocks: residual blocks; units are also removed where all, or every second, of them is gone.
        known: what `first_fault` has found.
    """
    until = time.monotonic() + SECONDS
    found: dict[int, str] = {}
    if blocks:
        known = _NONE  # it may be one with some blocks gone
    for gone in _without(blocks):
        while numbers := [n for n in range(len(trial.channels.groups)) if n not in found]:
            if time.monotonic() > until and gone:
                return found
            fault = partial(_fault_in_time, trial, until, gone)
            if not known.reason:
                known = Fault(fault(numbers), trial.place, trial.layer)
            if not known.reason:
                break
            sets = made_alike(trial.channels.groups, numbers)
            first = suspects(trial.channels.groups, sets, known.place or known.layer)
            tried = (culprits(fault, [alike]) for alike in first)
            found |= next(filter(None, tried), {}) or culprits(fault, sets, known.reason)
            known = _NONE
    return found


def _without(blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    """The residual blocks that are gone while groups are tried."""
    return list(dict.fromkeys(((), tuple(blocks), tuple(blocks[::2]))))


def _fault_in_time(
    trial: Trial, until: float, blocks: Sequence[Block], numbers: Sequence[int]
) -> str:
    """`trial.fault`, as long as there is time."""
    if time.monotonic() < until:
        return trial.fault(numbers, until, blocks)
    trial.place = trial.layer = None
    return (
        f"was not proven within {SECONDS:g} seconds; pass smaller example inputs, or verify=False "
        "to go without the proof"
    )
