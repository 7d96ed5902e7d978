"""The record of random networks is of thousands of draws, of every piece, and none was wrong."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings

from tests.helpers import ROOT
from tests.tracing import test_random_networks as tests
from tests.tracing.pieces import HEADS, KINDS
from tools import random_networks as tool

KEPT = json.loads((ROOT / tool.RESULT).read_text())
#: The pieces that each property draws from.
PIECES = {
    "removal": {*KINDS, *HEADS},
    "labels": {*tests.LABELLED, *HEADS},
    "filters": {*tests.MOVES},
}


def test_every_property_has_drawn_every_piece():
    assert KEPT.keys() == PIECES.keys() == tool.PROPERTIES.keys()
    for name, runs in KEPT.items():
        assert {piece for run in runs for piece in run["pieces"]} == PIECES[name]
        assert not any(run["wrong"] or run["commit"].endswith("+") for run in runs)
        assert len({run["seed"] for run in runs}) == len(runs)


def test_thousands_were_drawn():
    drawn = {name: sum(run["draws"] for run in runs) for name, runs in KEPT.items()}
    assert sum(drawn.values()) >= 3000
    text = (ROOT / "docs/tracing.md").read_text()
    assert all(f"{count:,}" in text for count in drawn.values())


def test_a_run_counts_the_draws_that_were_of_use(keep_threads):
    seen = []

    @settings(database=None)
    @given(kinds=tests.pieces(tests.MOVES), seed=tests.SEEDS)
    def pieces(kinds, seed):
        assume(len(kinds) > 1)
        seen.extend(kinds)

    number = random.randrange(10**6)
    run = tool.drawn(pieces, number)
    assert run["seed"] == number
    assert run["pieces"] == dict(sorted(Counter(seen).items()))
    assert 2 * run["draws"] <= len(seen)

    @settings(database=None)
    @given(kinds=tests.pieces(tests.MOVES), seed=tests.SEEDS)
    def never(kinds, seed):
        assert len(kinds) < 2

    with pytest.raises(AssertionError):
        tool.drawn(never, number)
