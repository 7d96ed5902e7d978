"""A fresh sample of the cases of a test whose parameters multiply.

`@pytest.mark.sample` stands on tests of which a whole product of parameters is too long to run each
time, and whose code takes the parameters' values apart from each other. Of its cases a run draws
some, so that each value of each parameter is among them; with `@pytest.mark.sample(20)` it draws
twenty at least, and with `@pytest.mark.sample(20, covering=False)` twenty, whatever their values:
where each takes long, and what differs between them is tested elsewhere too. Another run draws
others. The mark may stand on some of a test's cases alone: the others always run.

The environment variable TAYLOR_KERNELS_SAMPLE is the number that a run says it drew by, to draw the
same again, or `all`, to run every case. A case that is named on the command line runs; those of
`some` are there only in runs that draw them, so that the number belongs to their name. The numbers
that tests draw from the global generators follow it too (tests/conftest.py): what one has failed on
comes again, whichever tests ran before it.

Of properties of random networks each run draws some examples as well; TAYLOR_KERNELS_DRAWS is the
number of them, where others are wanted.
"""

from __future__ import annotations

import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import pytest

Value = TypeVar("Value")

VARIABLE = "TAYLOR_KERNELS_SAMPLE"
ALL = "all"
DRAWS = "TAYLOR_KERNELS_DRAWS"


def draws(few: int) -> int:
    """How many examples of a property are drawn: `few`, but where the environment says more."""
    return int(os.environ.get(DRAWS, few))


def choose() -> str:
    """What this run and the processes that it starts draw by."""
    return os.environ.setdefault(VARIABLE, str(random.SystemRandom().randrange(10**6)))


def seed_of(test: str) -> int | None:
    """What a test of this name draws its numbers by in this run; none where every case runs, whose
    name draws nothing."""
    return None if choose() == ALL else stream(test).getrandbits(32)


def some(values: Sequence[Value], count: int) -> list[Value]:
    """So many of them as this run draws them, or all where it runs every case."""
    if choose() == ALL:
        return list(values)
    caller = sys._getframe(1).f_globals["__name__"]
    return stream(f"{caller} {count} of {len(values)}").sample(values, count)


def stream(name: str) -> random.Random:
    """Random numbers of this run, others for each name: what is drawn in two places does not move
    together."""
    return random.Random(f"{choose()} {name}")


def left_out(items: Iterable[pytest.Item], arguments: Iterable[str]) -> list[pytest.Item]:
    """Those that this run, with such arguments on the command line, does not draw."""
    if choose() == ALL or any("[" in argument for argument in arguments):
        return []
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            tests[item.nodeid.partition("[")[0]].append(item)
    out = []
    for function, cases in tests.items():
        mark = cases[0].get_closest_marker("sample")
        assert mark is not None
        draw = stream(function)
        kept = {id(case) for case in drawn(cases, *mark.args, **mark.kwargs, draw=draw)}
        out += [case for case in cases if id(case) not in kept]
    return out


def drawn(
    cases: Sequence[pytest.Item], least: int = 0, *, covering: bool = True, draw: random.Random
) -> list[pytest.Item]:
    """`least` cases at least if there are so many, and if `covering` each value that is among
    them."""
    ahead = draw.sample(cases, len(cases))
    values = {id(case): _values(case) if covering else set() for case in ahead}
    missing = set().union(*values.values())
    kept: list[pytest.Item] = []
    while ahead and (missing or len(kept) < least):
        best = max(ahead, key=lambda case: len(values[id(case)] & missing))
        ahead.remove(best)
        missing -= values[id(best)]
        kept.append(best)
    return kept


def _values(case: pytest.Item) -> set[tuple[str, object]]:
    """The parameters of a case: their names, and what tells their values apart."""
    call = getattr(case, "callspec", None)
    if call is None:
        return set()
    return {(name, _key(value)) for name, value in call.params.items()}


def _key(value: object) -> object:
    shown = repr(value)  # beside it, as 0 is False for Python
    try:
        hash(value)
    except TypeError:
        return shown
    return shown, value
