"""The oracle: samples, budgets, and runs that are killed and go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="compare needs SciPy")

import taylor_kernels as tk
from taylor_kernels.studies.cache import Cache, Piece
from taylor_kernels.studies.oracle import oracle
from taylor_kernels.studies.oracle.measure import identity
from taylor_kernels.studies.oracle.oracle import draw_sample, loss_changes, stratified
from tests.helpers.problems import WIDTHS, Counted, other_loss, quiet, small_problem

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path)


def kept(cache: Cache, settings: dict) -> Piece:
    return cache.piece("oracle", settings, by=[loss_changes])


def test_changes_squared_are_the_scores_of_the_oracle_criterion(cache):
    problem = small_problem()
    changes = loss_changes(problem, problem.filters, identity(problem), cache, quiet())
    imp = tk.Importance(problem.model, "oracle", layers=problem.layers)
    imp.update(closure=lambda: torch.tensor(problem.mean_loss(), dtype=torch.float64))
    scores = imp.compute()
    assert {name: len(score) for name, score in scores.items()} == WIDTHS
    for (name, number), change in changes.items():
        assert change**2 == pytest.approx(scores[name][number].item(), rel=1e-4, abs=1e-12)


def test_a_sample_has_the_changes_of_the_full_oracle(tmp_path):
    problem = small_problem()
    settings = identity(problem)
    whole = loss_changes(problem, problem.filters, settings, Cache(tmp_path / "a"), quiet())
    sample = stratified(problem.widths, 11, seed=3)
    part = loss_changes(problem, sample, settings, Cache(tmp_path / "b"), quiet())
    assert part == {one: whole[one] for one in sample}


@pytest.mark.parametrize("stop_at", [2, 30, 95])
def test_a_run_that_is_stopped_goes_on_and_evaluates_nothing_twice(cache, tmp_path, stop_at):
    problem, loss = small_problem(), Counted()
    problem = other_loss(problem, loss)
    settings = identity(problem)
    batches, filters = len(problem.oracle_batches), len(problem.filters)
    plain = loss_changes(problem, problem.filters, settings, Cache(tmp_path / "other"), quiet())
    assert loss.calls == batches * (1 + filters)  # the loss with all filters, then without each

    loss.calls, loss.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        loss_changes(problem, problem.filters, settings, cache, quiet())
    done = max(0, (stop_at - 1) // batches - 1)
    saved = kept(cache, settings).load()
    assert sum(len(layer) for layer in saved.values()) == done

    loss.calls, loss.stop_at = 0, None
    assert loss_changes(problem, problem.filters, settings, cache, quiet()) == plain
    assert loss.calls == batches * (1 + filters - done)
    assert loss_changes(problem, problem.filters, settings, cache, quiet()) == plain
    assert loss.calls == batches * (1 + filters - done)  # nothing is left to evaluate


class Deadly(Counted):
    """Ends its process by SIGKILL where Counted stops."""

    def __call__(self, outputs, targets):
        if self.calls + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(outputs, targets)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_that_is_killed_goes_on_to_the_same_result(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "SAVE_SECONDS", -1.0)
    loss = Deadly()
    problem = other_loss(small_problem(), loss)
    settings = identity(problem)
    plain = loss_changes(problem, problem.filters, settings, Cache(tmp_path / "other"), quiet())
    calls, loss.calls, loss.stop_at = loss.calls, 0, 50

    def run():
        loss_changes(problem, problem.filters, settings, cache, quiet())

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    loss.calls, loss.stop_at = 0, None
    assert loss_changes(problem, problem.filters, settings, cache, quiet()) == plain
    assert loss.calls < calls


def test_what_is_evaluated_is_on_disk_before_the_end(cache, monkeypatch):
    """A kill that cannot be caught loses no more than SAVE_SECONDS."""
    monkeypatch.setattr(oracle, "SAVE_SECONDS", -1.0)
    problem = small_problem()
    seen = []

    class Watching(Counted):
        def __call__(self, outputs, targets):
            saved = kept(cache, settings).load() or {}
            seen.append(sum(len(layer) for layer in saved.values()))
            return super().__call__(outputs, targets)

    problem = other_loss(problem, Watching())
    settings = identity(problem)
    loss_changes(problem, problem.filters, settings, cache, quiet())
    expected = [max(0, call // len(problem.oracle_batches) - 1) for call in range(len(seen))]
    assert seen == expected


def test_a_larger_sample_evaluates_what_is_new_alone(cache):
    loss = Counted()
    problem = other_loss(small_problem(), loss)
    settings = identity(problem)
    few, many = (stratified(problem.widths, count, seed=0) for count in (8, 16))
    loss_changes(problem, few, settings, cache, quiet())
    loss.calls = 0
    loss_changes(problem, many, settings, cache, quiet())
    assert loss.calls == len(problem.oracle_batches) * (1 + len(set(many) - set(few)))


@pytest.mark.parametrize("change", ["weights", "data", "nothing"])
def test_pieces_of_another_network_or_other_data_are_not_taken(cache, change):
    loss = Counted()
    problem = other_loss(small_problem(), loss)
    loss_changes(problem, problem.filters, identity(problem), cache, quiet())
    if change == "weights":
        with torch.no_grad():
            problem.model[0].weight[0] *= 1.001
    elif change == "data":
        problem.oracle_batches[0][0][0] += 1e-3
    loss.calls = 0
    loss_changes(problem, problem.filters, identity(problem), cache, quiet())
    assert (loss.calls > 0) == (change != "nothing")


def test_a_damaged_piece_is_made_again(cache):
    problem = small_problem()
    settings = identity(problem)
    before = loss_changes(problem, problem.filters, settings, cache, quiet())
    file = kept(cache, settings).file
    file.write_text(file.read_text()[:-20])
    assert loss_changes(problem, problem.filters, settings, cache, quiet()) == before
    json.loads(file.read_text())


def test_a_state_that_is_no_tensor_is_no_obstacle():
    problem = small_problem()

    class Noted(torch.nn.Identity):
        def get_extra_state(self):
            return {"version": 3, "scale": torch.ones(2)}

    problem.model[7] = Noted()
    assert len(identity(problem)["weights"]) == 16


def test_the_budget_decides_how_many_filters_and_a_rerun_keeps_to_them(cache, monkeypatch):
    problem = small_problem()
    settings = identity(problem)

    def sample(budget, seconds, count=None):
        monkeypatch.setattr(oracle, "_evaluation_seconds", lambda _: seconds)
        return draw_sample(problem, settings, cache, count=count, budget=budget, seed=1)

    some = sample(10.0, 1.0)
    assert len(some.filters) == 10
    assert str(some) == "10 of 24 filters, chosen at random (seed 1)"
    assert sample(10.0, 0.1).filters == some.filters  # the machine is faster now
    whole = sample(100.0, 1.0)
    assert whole.full
    assert str(whole) == "all 24 filters"
    assert len(sample(1e-9, 1.0).filters) == len(WIDTHS)
    assert len(sample(100.0, 1.0, count=5).filters) == 5


widths = st.dictionaries(
    st.text(min_size=1, max_size=3), st.integers(1, 40), min_size=1, max_size=8
)


@given(widths, st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_a_stratified_sample_is_as_large_as_asked_and_fair(widths, count, seed):
    total = sum(widths.values())
    chosen = stratified(widths, count, seed)
    expected = max(min(count, total), len(widths))
    assert len(set(chosen)) == len(chosen) == expected
    assert chosen == stratified(widths, count, seed)
    for name, width in widths.items():
        numbers = [number for layer, number in chosen if layer == name]
        assert numbers == sorted(numbers)
        assert all(0 <= number < width for number in numbers)
        assert len(numbers) >= 1
        fair = expected * width / total
        assert len(numbers) <= fair + len(widths)
