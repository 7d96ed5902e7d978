"""Norms that code calls as functions, beside other things that it does.

`F.layer_norm(x, (x.size(-1),))` in the code of a block takes its statistics of all channels, as a
module does that is a norm and nothing else (across.py), and removal means the same. A call is known
by its place in the code of the module that calls, and by its number among those of one run at that
place, as in a loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from taylor_kernels.tracing.model.code import Place
from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.entries import NormCall

#: The functions by which code calls them, as operations.
FUNCTIONS = {"layer_norm", "rms_norm"}


@dataclass(frozen=True)
class CalledNorms:
    """The norms that a module's own code calls.

    Attributes:
        vectors: for each call its place, and the classes of the channels, None if these stay. Those
            at one place are in the order of a run.
        lifted: the places in a record's `fixed` that say that these are mixed.
    """

    vectors: tuple[tuple[Place, Vector | None], ...]
    lifted: frozenset[int]


def accepted_calls(
    runs: Iterable[tuple[str, Sequence[NormCall]]],
    fixed: Sequence[tuple[Vector, Reason]],
    label: Vector,
    others: Iterable[str],
) -> dict[str, CalledNorms]:
    """The modules of which all runs that come to a place of the code call as many norms there, of
    the same channels in the same order.

    Args:
        runs: module -> what it has called in one run; there may be several of a module.
        label: atom -> class.
        others: modules that are norms themselves.
    """
    by_module: dict[str, dict[Place, list[list[NormCall]]]] = {}
    for module, calls in runs:
        here: dict[Place, list[NormCall]] = {}
        for call in calls:
            here.setdefault(call.place, []).append(call)
        for place, some in here.items():
            by_module.setdefault(module, {}).setdefault(place, []).append(some)
    found = {}
    for module in by_module.keys() - set(others):
        places = by_module[module]
        if all(len(set(map(len, every))) == 1 for every in places.values()):
            calls_of = [
                (place, same, _channels(same, label))
                for place, every in places.items()
                for same in zip(*every, strict=True)
            ]
            lifted = frozenset(
                number
                for _, same, vector in calls_of
                if vector is not None
                for call in same
                for number in call.fixed
                if fixed[number][1].mixer
            )
            if lifted:
                vectors = tuple((place, vector) for place, _, vector in calls_of)
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
