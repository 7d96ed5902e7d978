"""The cases that a run draws of tests whose parameters multiply (tests/helpers/samples.py)."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import gpu_compile, samples

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def cases(sizes: list[int], function: str = "f.py::test") -> list[Any]:
    """Those of a test with so many values of each of its parameters."""
    mark = SimpleNamespace(args=(), kwargs={})
    return [
        SimpleNamespace(
            nodeid=f"{function}[{values}]",
            callspec=SimpleNamespace(params={str(i): [v] for i, v in enumerate(values)}),
            get_closest_marker=lambda name: mark if name == "sample" else None,
        )
        for values in product(*map(range, sizes))
    ]


@given(SIZES, st.integers(0, 60), st.randoms(use_true_random=False))
def test_each_value_is_drawn_and_so_many_cases(sizes: list[int], least: int, draw: Any) -> None:
    every = cases(sizes)
    kept = samples.drawn(every, least, draw=draw)
    for i, count in enumerate(sizes):
        assert {case.callspec.params[str(i)][0] for case in kept} == set(range(count))
    assert len({id(case) for case in kept}) == len(kept) >= min(least, len(every))
    assert len(kept) <= max(least, sum(sizes))


@given(SIZES, st.integers(0, 60), st.randoms(use_true_random=False))
def test_just_so_many_are_drawn_where_values_need_not_all_be(sizes, least, draw) -> None:
    every = cases(sizes)
    kept = samples.drawn(every, least, covering=False, draw=draw)
    assert len({id(case) for case in kept}) == len(kept) == min(least, len(every))


@given(st.randoms(use_true_random=False))
def test_values_that_are_equal_and_not_the_same_are_all_drawn(draw: Any) -> None:
    mixed = [0, False, 1, True, 1.0, (0, 1), (False, True), None]
    every = cases([len(mixed)])
    for case, value in zip(every, mixed, strict=True):
        case.callspec.params = {"value": value}
    assert len(samples.drawn(every, draw=draw)) == len(mixed)


def test_a_number_draws_the_same_again_and_another_others(monkeypatch: pytest.MonkeyPatch) -> None:
    every = cases([6, 5]) + cases([6, 5], "f.py::test_more")
    draws = set()
    for number in random.sample(range(10**6), 20):
        monkeypatch.setenv(samples.VARIABLE, str(number))
        out = [item.nodeid for item in samples.left_out(every, [])]
        assert out == [item.nodeid for item in samples.left_out(every, [])]
        assert {name.partition("[")[0] for name in out} == {"f.py::test", "f.py::test_more"}
        chosen = samples.some(range(9), 3)
        assert chosen == samples.some(range(9), 3)
        assert len(set(chosen)) == 3
        draws.add((*out, *chosen))
    assert len(draws) > 1


def test_numbers_that_a_test_draws_follow_the_run_and_its_name(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    seed = samples.seed_of(request.node.nodeid)
    if samples.choose() != samples.ALL:
        generator = torch.Generator().manual_seed(seed)
        assert drawn == (
            random.Random(seed).random(),
            np.random.RandomState(seed).rand(),
            torch.rand((), generator=generator).item(),
        )
    monkeypatch.setenv(samples.VARIABLE, "7")
    seeds = {samples.seed_of(name) for name in ("one", "another", "one")}
    monkeypatch.setenv(samples.VARIABLE, "8")
    assert len(seeds | {samples.seed_of("one")}) == 3
    monkeypatch.setenv(samples.VARIABLE, samples.ALL)
    assert samples.seed_of("one") is None


def test_every_case_runs_where_that_is_asked_or_a_case_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = cases([3, 4])
    monkeypatch.setenv(samples.VARIABLE, "7")
    assert not samples.left_out(every, ["tests/f.py::test[(0, 1)]"])
    monkeypatch.setenv(samples.VARIABLE, samples.ALL)
    assert not samples.left_out(every, [])
    assert samples.some(range(9), 3) == list(range(9))


def test_every_cuda_source_is_compiled_for_every_architecture_in_some_run(monkeypatch):
    record = json.loads(gpu_compile.RECORD.read_text())["sources"]
    monkeypatch.setattr(gpu_compile, "text_digest", lambda source: record[source.stem])
    seen = Counter()
    for number in range(400):
        monkeypatch.setenv(samples.VARIABLE, str(number))
        for source in gpu_compile.SOURCES:
            seen.update((source.stem, arch) for arch in gpu_compile.architectures_of(source))
    assert len(seen) == len(gpu_compile.SOURCES) * len(gpu_compile.ARCHITECTURES)
    assert min(seen.values()) > 30  # of 67 that are expected
