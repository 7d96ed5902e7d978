"""Union-find over atoms, against one that goes from atom to atom."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from taylor_kernels.tracing.notes.forest import Forest


def united(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """For each of `count` atoms the least one that these pairs lead to."""
    label = list(range(count))
    for _ in range(count):
        for one, other in pairs:
            label[one] = label[other] = min(label[one], label[other])
    return label


@st.composite
def runs(draw) -> list[tuple[int, int, int]]:
    """Runs of atoms of equal sizes, some the same ones, some that overlap."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        size = draw(st.sampled_from((1, 2, 4)))
        aligned = draw(st.booleans())
        starts = (
            st.integers(0, 6).map(lambda n, s=size: 1 + 4 * n) if aligned else st.integers(1, 26)
        )
        found.append((draw(starts), draw(starts), size))
    return found


@given(runs())
@settings(max_examples=80)
def test_runs_are_united_place_by_place(runs):
    forest = Forest(32)
    if runs:
        forest.unite_runs(*(np.array(column, np.int64) for column in zip(*runs, strict=True)))
    pairs = [(one + i, other + i) for one, other, size in runs for i in range(size)]
    assert forest.label.tolist() == united(32, pairs)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15))))
@settings(max_examples=50)
def test_pairs_are_united(pairs):
    forest = Forest(16)
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    for half in (columns[: len(pairs) // 2], columns[len(pairs) // 2 :]):
        forest.unite([(half[:, 0], half[:, 1])])
    assert forest.label.tolist() == united(16, pairs)
