"""Norms that code calls as functions, beside other things that it does.

`F.layer_norm(x, (x.size(-1),))` in the code of a block takes its statistics of all channels, as a
module does that is a norm and nothing else (across.py), and removal means the same. A call is known
by its number among those of one run of the module whose code calls: as code goes the same way each
time, the calls of that number normalise the same channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from taylor_kernels.tracing.record import NormCall, Reason, Vector

#: The functions by which code calls them, as operations.
FUNCTIONS = {"layer_norm", "rms_norm"}


@dataclass(frozen=True)
class CalledNorms:
    """The norms that a module's own code calls.

    Attributes:
        vectors: the classes of the channels, call by call; None for calls whose channels stay.
        lifted: the places in a record's `fixed` that say that these are mixed.
    """

    vectors: tuple[Vector | None, ...]
    lifted: frozenset[int]


def accepted_calls(
    runs: Iterable[tuple[str, Sequence[NormCall]]],
    fixed: Sequence[tuple[Vector, Reason]],
    label: Vector,
    others: Iterable[str],
) -> dict[str, CalledNorms]:
    """The modules of which every run calls as many norms, of the same channels in the same order.

    Args:
        runs: module -> what it has called in one run; there may be several of a module.
        label: atom -> class.
        others: modules that are norms themselves.
    """
    by_module: dict[str, list[Sequence[NormCall]]] = {}
    for module, calls in runs:
        by_module.setdefault(module, []).append(calls)
    found = {}
    for module in by_module.keys() - set(others):
        every = by_module[module]
        if len({len(calls) for calls in every}) == 1:
            vectors = tuple(_channels(same, label) for same in zip(*every, strict=True))
            lifted = frozenset(
                number
                for calls in every
                for call, vector in zip(calls, vectors, strict=True)
                if vector is not None
                for number in call.fixed
                if fixed[number][1].mixer
            )
            if lifted:
                found[module] = CalledNorms(vectors, lifted)
    return found


def _channels(calls: Sequence[NormCall], label: Vector) -> Vector | None:
    """The classes that all these calls normalise, with parameters along them; None if there are
    no such."""
    first = calls[0].channels
    if first is None or not first.all():
        return None
    classes = label[first]
    every = [vector for call in calls for vector in (call.channels, *call.parameters)]
    same = all(v is not None and np.array_equal(label[v], classes) for v in every)
    return classes if same else None
