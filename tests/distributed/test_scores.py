"""Scores over ranks are those of one process that sees the same minibatches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.distributed.scores import degree
from taylor_kernels.statistics import find_layers, get_statistic
from tests.distributed import runs
from tests.distributed.launch import ran
from tests.distributed.runs import EVEN, close, formula
from tests.distributed.threads import Averaged, ThreadRanks, in_threads

pytestmark = pytest.mark.usefixtures("one_thread")
#: Σ q² over the weights of a filter cannot be had from the parts of a minibatch. What is drawn is
#: drawn anew on every rank.
WHOLE = ["taylor_so"]
SAMPLED = ["taylor_so_diag", "obd_bn", "obd_fisher_mc"]
EXACT = [n for n in tk.criterion_names() if n not in (*WHOLE, *SAMPLED)]


def same_bits(found):
    for other in found[1:]:
        for name, value in found[0]["scores"].items():
            assert torch.equal(value.nan_to_num(7.0), other["scores"][name].nan_to_num(7.0))
        assert other["state"]["counts"] == found[0]["state"]["counts"]


def joined(cuts, seed=1):
    return runs.minibatches(len(cuts), sum(cuts[0]), seed)


@pytest.mark.parametrize("criterion", EXACT)
def test_of_one_minibatch_in_parts(criterion):
    found = in_threads(2, runs.scored, criterion, EVEN, {})
    wanted = runs.alone(criterion, joined(EVEN))
    close(found[0], wanted, "scores")
    close(found[0], wanted, "error")
    same_bits(found)


@pytest.mark.parametrize("criterion", SAMPLED)
def test_what_is_drawn_is_the_mean_of_the_draws_of_the_ranks(criterion):
    chosen = get_criterion(criterion)
    kind = get_statistic(chosen.statistic)
    wanted: dict[str, torch.Tensor] = {}
    for number, of_ranks in enumerate(runs.parts(EVEN)):
        shares = []
        for rank, batch in enumerate(of_ranks):
            model = runs.network()
            layers = find_layers(model, None, trainable_only=False)
            statistic = kind(model, layers)
            statistic.updates = 2 * number + rank  # draws of its own
            tables = statistic.collect(closure=lambda m=model, b=batch: runs.loss_of(m, b))
            shares.append([kind.shared(table.detach().double()) for table in tables])
        for name, *columns in zip(layers, *shares, strict=True):
            table = kind.unshared(sum(columns) / 2)
            wanted[name] = wanted.get(name, 0) + chosen.observations(table)[:, 0] / len(EVEN)
    found = in_threads(2, runs.scored, criterion, EVEN, {})
    same_bits(found)
    close(found[0], {"scores": {n: s.float() for n, s in wanted.items()}}, "scores")


@st.composite
def cut(draw):
    """Minibatches of 7 examples among 2 to 4 ranks, some of which have none of one."""
    size = draw(st.integers(2, 4))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        ends = sorted(draw(st.lists(st.integers(0, 7), min_size=size - 1, max_size=size - 1)))
        found.append([b - a for a, b in zip([0, *ends], [*ends, 7], strict=True)])
    return found


UNEVEN = ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher", "taylor_so_diag_exact", "obd_hutchinson"]


@settings(max_examples=8)
@given(cuts=cut(), criterion=st.sampled_from(UNEVEN), window=st.integers(1, 5))
def test_uneven_parts_weighed_by_their_examples(cuts, criterion, window):
    options = {"window": window}
    found = in_threads(len(cuts[0]), runs.scored, criterion, cuts, options, "mean", True)
    close(found[0], runs.alone(criterion, joined(cuts)), "scores")
    same_bits(found)


@settings(max_examples=5)
@given(cuts=cut(), criterion=st.sampled_from([n for n in UNEVEN if n != "obd_fisher"]))
def test_summed_losses(cuts, criterion):
    found = in_threads(len(cuts[0]), runs.scored, criterion, cuts, {"loss": "sum"}, "sum")
    close(found[0], runs.alone(criterion, joined(cuts), "sum"), "scores")
    same_bits(found)


def test_obd_fisher_is_of_each_examples_own_loss_whatever_is_summed():
    cuts = [[3, 4], [5, 2], [7, 0]]
    found = in_threads(2, runs.scored, "obd_fisher", cuts, {"loss": "sum"}, "sum")
    close(found[0], runs.alone("obd_fisher", joined(cuts), "sum", scale=7.0), "scores")


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_joint", "taylor_abs"])
@pytest.mark.parametrize(
    ("gradients", "loss"), [("averaged", "sum"), ("summed", "mean"), ("summed", "sum")]
)
def test_what_grad_holds_is_made_up_for(criterion, gradients, loss):
    def run(rank, size, meeting):
        model = runs.network()
        ranks = ThreadRanks(meeting, rank, gradients=gradients, loss=loss)
        imp = tk.Importance(model, criterion, ranks=ranks)
        for of_ranks in runs.parts(EVEN):
            model.zero_grad()
            runs.loss_of(model, of_ranks[rank], loss).backward()
            Averaged(model, ranks).average()
            if gradients == "summed":
                for parameter in model.parameters():
                    parameter.grad.mul_(size)
            imp.update()
        return runs.result(imp, ranks)

    found = in_threads(2, run)
    close(found[0], runs.alone(criterion, joined(EVEN), loss), "scores")
    same_bits(found)


LOCAL = ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "obd_fisher", "taylor_so", "magnitude_l2"]


@pytest.mark.parametrize("criterion", LOCAL)
def test_minibatches_of_their_own(criterion):
    """As if one process saw them one after the other, a rank that ends early among them."""
    cuts = [[4, 3], [2, 5], [7, 0]]
    options = {"minibatch": "local", "gradients": "local"}
    found = in_threads(2, runs.scored, criterion, cuts, options)
    one_by_one = [batch for of_ranks in runs.parts(cuts) for batch in of_ranks if batch]
    wanted = runs.alone(criterion, one_by_one)
    close(found[0], wanted, "scores")
    same_bits(found)
    if runs.reads(criterion) != "weights":  # of which there is one, whoever reads it
        close(found[0], wanted, "error")


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher", "taylor_fo"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rank_whose_gradients_are_not_finite_makes_all_skip(criterion, value):
    def spoil(rank, number, batch):
        return (batch[0] * value, batch[1]) if (rank, number) == (1, 2) else batch

    cuts = [[4, 4]] * 4
    found = in_threads(2, runs.scored, criterion, cuts, {}, "mean", False, spoil)
    whole = joined(cuts)
    close(found[0], runs.alone(criterion, [*whole[:2], whole[3]]), "scores")
    same_bits(found)
    assert [one["dropped"] for one in found] == [1, 1]
    assert found[0]["state"]["updates"] == 3


def test_a_minibatch_that_one_rank_skips_counts_on_none():
    def run(rank, size, meeting):
        model = runs.network()
        ranks = ThreadRanks(meeting, rank)
        imp = tk.Importance(model, "taylor_fo_bn", ranks=ranks)
        for number, of_ranks in enumerate(runs.parts(EVEN)):
            if (rank, number) == (0, 1):
                runs.loss_of(model, of_ranks[rank]).backward()
                imp.skip()
            else:
                runs.update(imp, model, of_ranks[rank])
        return runs.result(imp, ranks)

    found = in_threads(2, run)
    whole = joined(EVEN)
    close(found[0], runs.alone("taylor_fo_bn", [whole[0], whole[2]]), "scores")
    same_bits(found)


IN_PROCESSES = ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher", "taylor_fo", "taylor_fo_joint"]


@pytest.mark.parametrize("size", [2, 4])
def test_of_processes_under_ddp(size):
    cuts = [[8 // size] * size] * 3
    found = ran(size, runs.in_processes, IN_PROCESSES, cuts)
    for criterion in IN_PROCESSES:
        ours = [one[criterion] for one in found]
        wanted = runs.alone(criterion, joined(cuts))
        close(ours[0], wanted, "scores")
        close(ours[0], wanted, "error")
        same_bits(ours)
        assert {one["collectives"] for one in ours} == {1}
        assert {one["bytes"] for one in ours} == {formula(criterion, 3)}


def test_the_state_is_that_of_any_number_of_ranks():
    whole = joined([[4, 4]] * 6)

    def run(rank, size, meeting, state, batches):
        model = runs.network()
        ranks = ThreadRanks(meeting, rank)
        imp = tk.Importance(model, "taylor_fo_bn", ranks=ranks)
        if state is not None:
            imp.load_state_dict(state)
        for batch in batches:
            runs.update(imp, model, runs.part(batch, rank, [8 // size] * size))
        with pytest.raises(RuntimeError, match="call sync"):
            imp.state_dict()
        imp.sync()
        return runs.result(imp, ranks)

    first = in_threads(4, run, None, whole[:2])[0]
    second = in_threads(2, run, first["state"], whole[2:4])[0]
    third = in_threads(1, run, second["state"], whole[4:])[0]
    close(third, runs.alone("taylor_fo_bn", whole), "scores", "error")


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_power_of_gradients_in_a_score(power):
    criterion = tk.Criterion("p", "example_gates", lambda t: t.abs() ** power)
    assert degree(criterion) == power


def test_a_statistic_of_ones_own_adds_up_or_says_why_not():
    class Both(tk.Statistic):
        name = "both"
        columns = "2: Σ g, Σ gw"
        reads = "weight gradients"
        across_ranks = "sum"
        shared_columns = 2

        def collect(self, *, loss_scale=1.0, closure=None):
            weights = [layer.weight for layer in self.layers.values()]
            found = [(weight.grad / loss_scale, weight.detach()) for weight in weights]
            return [torch.stack((g.flatten(1).sum(1), (g * w).flatten(1).sum(1)), 1)
                    for g, w in found]  # fmt: skip

    tk.register_statistic(Both)
    criterion = tk.Criterion("both", "both", lambda table: table.prod(1))
    found = in_threads(2, runs.scored, criterion, EVEN, {"gradients": "local"})
    wanted = runs.alone(criterion, joined(EVEN))
    close(found[0], wanted, "scores")
    same_bits(found)
    summed = {"gradients": "averaged", "loss": "sum"}
    found = in_threads(2, runs.scored, criterion, EVEN, summed, "sum")
    close(found[0], runs.alone(criterion, joined(EVEN), "sum"), "scores")
    Both.shared_columns = 1
    with pytest.raises(ValueError, match=r"'both': 2 columns of layer '0' .* shared_columns is 1"):
        in_threads(2, runs.scored, criterion, EVEN, {"gradients": "local"})
