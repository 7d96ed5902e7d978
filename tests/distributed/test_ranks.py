"""Ranks that do not fit together, or whose arguments are wrong, are told so."""

from __future__ import annotations

import pytest

import taylor_kernels as tk
from tests.distributed import runs
from tests.distributed.launch import outcomes, ran
from tests.distributed.runs import EVEN, formula
from tests.distributed.threads import Averaged, Meeting, ThreadRanks, in_threads

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_said_of_gradients_is_looked_at():
    def run(rank, size, meeting, gradients, average):
        model = runs.network()
        ranks = ThreadRanks(meeting, rank, gradients=gradients)
        imp = tk.Importance(model, "taylor_fo", ranks=ranks)
        runs.loss_of(model, runs.parts(EVEN)[0][rank]).backward()
        if average:
            Averaged(model, ranks).average()
        imp.update()
        return imp.compute()

    with pytest.raises(RuntimeError, match=r"^0: its scores differ among the ranks \(4 of 4"):
        in_threads(2, run, "averaged", False)
    with pytest.raises(RuntimeError, match="every rank holds the same ones"):
        in_threads(2, run, "local", True)
    in_threads(2, run, "averaged", True)
    in_threads(2, run, "local", False)


def test_ranks_that_do_not_fit_together_are_told():
    def run(rank, size, meeting, criteria):
        model = runs.network()
        imp = tk.Importance(model, criteria[rank], ranks=ThreadRanks(meeting, rank))
        runs.update(imp, model, runs.minibatches(1, 4)[0])
        return imp.compute()

    with pytest.raises(RuntimeError, match="rank 1 has another criterion, layers or Ranks"):
        in_threads(2, run, ["taylor_fo_gate", "taylor_fo"])


def counts_differently(rank, size):
    """Rank 1 sees three minibatches and names two layers, rank 0 one of each."""
    model = runs.network()
    ranks = tk.distributed.Ranks(timeout=30.0)
    imp = tk.Importance(model, "taylor_fo_bn", ranks=ranks)
    for batch in runs.minibatches(1 + 2 * rank, 4):
        runs.update(imp, model, batch)
    names = ["a", "b"][: 1 + rank]
    errors = []
    for call in (imp.compute, lambda: ranks.check_alike(dict.fromkeys(names, 1), "the masks")):
        with pytest.raises(RuntimeError) as caught:
            call()
        errors.append(str(caught.value))
        ranks.check_done(None, "go on")  # the ranks can still meet
    return errors


def test_ranks_that_have_different_lengths_to_send_are_told():
    first, second = ran(2, counts_differently)
    assert first == second
    rounds, hashes = first
    assert "equally often, or absent()" in rounds
    lengths = [formula("taylor_fo_bn", minibatches) for minibatches in (1, 3)]
    assert "rank 0 has {} bytes, rank 1 {}.".format(*lengths) in rounds
    assert "rank 0 has 16 bytes, rank 1 24." in hashes


def stops(rank, size):
    """Rank 1 never comes."""
    model = runs.network()
    imp = tk.Importance(model, "taylor_fo_bn", ranks=tk.distributed.Ranks(timeout=1.0))
    runs.update(imp, model, runs.minibatches(1, 4)[0])
    if rank == 0:
        imp.compute()


def test_nobody_waits_for_ever():
    found = outcomes(2, stops)
    assert "the ranks' exchange failed" in found[0]["error"]
    assert "has another rank stopped?" in found[0]["error"]
    assert "result" in found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": "mean"}, "gradients: 'mean' is not one of averaged, summed, local"),
        ({"loss": "average"}, "loss: 'average' is not one of mean, sum"),
        ({"minibatch": "all"}, "minibatch: 'all' is not one of global, local"),
        ({"window": 0}, "window: expected a number of minibatches"),
        ({"timeout": -1}, "timeout: expected seconds"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ThreadRanks(Meeting(1), 0, **options)


def test_ranks_need_a_group():
    with pytest.raises(RuntimeError, match=r"call init_process_group\(\) first"):
        tk.distributed.Ranks()


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), "3"])
def test_wrong_weights(weight):
    model = runs.network()
    imp = tk.Importance(model, "taylor_fo", ranks=ThreadRanks(Meeting(1), 0))
    runs.loss_of(model, runs.minibatches(1, 4)[0]).backward()
    with pytest.raises(ValueError, match=r"weight: .* calls absent\(\)"):
        imp.update(weight=weight)


def test_absent_without_ranks():
    with pytest.raises(RuntimeError, match="the meter has no ranks="):
        tk.Importance(runs.network(), "taylor_fo").absent()


def test_examples_that_are_scored_by_no_power_are_of_local_minibatches():
    criterion = tk.Criterion("e", "example_gates", lambda table: table.exp() - 1)
    with pytest.raises(ValueError, match=r"Ranks\(minibatch='local'\)"):
        tk.Importance(runs.network(), criterion, ranks=ThreadRanks(Meeting(1), 0))
    options = {"minibatch": "local"}
    tk.Importance(runs.network(), criterion, ranks=ThreadRanks(Meeting(1), 0, **options))
