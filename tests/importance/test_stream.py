"""Importance(stream=True): the same bits, and never two gradients at once."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from taylor_kernels.statistics import get_statistic
from tests.distributed import runs
from tests.distributed.threads import ThreadRanks, in_threads
from tests.helpers import nets

CRITERIA = [
    name
    for name in tk.criterion_names()
    if get_statistic(tk.criteria.get_criterion(name).statistic).reads == "weight gradients"
]


class Odd(nn.Module):
    """A sparse embedding tied to nothing, tied layers, frozen and unused ones, two uses of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, sparse=True)
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.inner.weight
        self.back = nn.ConvTranspose1d(6, 4, 1)  # filters lie in dimension 1
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.stuck = nn.Linear(4, 4)
        self.stuck.bias.requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.tanh(self.inner(self.embed(x)))
        x = torch.tanh(self.tied(torch.tanh(self.inner(x))))
        x = self.back(x.mT).mT
        return self.out(torch.tanh(self.stuck(self.frozen(x)))).mean(1)


def odd():
    return Odd(), (torch.randint(11, (7, 3)), torch.randint(5, (7,)))


def mixed():
    return nets.mixed(), nets.batch()


def scored(model, batches, criterion, loss_of=nets.loss_of, **options):
    model = copy.deepcopy(model)
    imp = tk.Importance(model, criterion, **options)
    for data in batches:
        model.zero_grad()
        loss_of(model, data).backward()
        imp.update()
    return imp


def check_same(one, other):
    """Scores and all sums are the same bits."""
    states = one.state_dict(), other.state_dict()
    for key, value in states[0].items():
        same = torch.equal(value, states[1][key]) if key.startswith("sum") else None
        assert same if same is not None else value == states[1][key]
    assert states[0]["sum"].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:1 layers with frozen weights")
@pytest.mark.parametrize("network", [mixed, odd])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_scores_are_the_same_bits(criterion, network):
    model, _ = network()
    batches = [network()[1] for _ in range(3)]
    plain = scored(model, batches, criterion)
    check_same(plain, scored(model, batches, criterion, stream=True))


def test_chosen_layers_and_checkpoints():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]

    def loss_of(model, data, reentrant):
        x = data[0]
        for part in model:
            x = checkpoint(part, x.requires_grad_(), use_reentrant=reentrant)
        return F.cross_entropy(x, data[1])

    plain = scored(model, batches, "taylor_fo", layers=["2"])
    check_same(plain, scored(model, batches, "taylor_fo", layers=["2"], stream=True))
    whole = scored(model, batches, "taylor_fo")
    for reentrant in (False, True):
        with_checkpoints = partial(loss_of, reentrant=reentrant)
        check_same(whole, scored(model, batches, "taylor_fo", with_checkpoints, stream=True))


def test_no_two_gradients_are_there_at_once():
    model, data = odd()
    trained = [p for p in model.parameters() if p.requires_grad]
    there = []
    with pytest.warns(UserWarning, match="frozen"):
        imp = tk.Importance(model, "taylor_fo", stream=True)

    def count(_):
        there.append(sum(p.grad is not None for p in trained))

    for p in trained:  # after the meter's
        p.register_post_accumulate_grad_hook(count)
    nets.loss_of(model, data).backward()
    assert there == [0] * (len(trained) - 2)  # the unused layer's come not at all
    imp.update()
    assert all(p.grad is None for p in model.parameters())
    imp.close()
    nets.loss_of(model, data).backward()
    assert model.out.weight.grad is not None


def test_a_second_backward_is_an_error_and_leaves_the_first():
    model, data = mixed()
    plain = scored(model, [data], "taylor_fo")
    model.zero_grad()
    imp = tk.Importance(model, "taylor_fo", stream=True)
    with pytest.raises(RuntimeError, match="no layer's gradient came"):
        imp.update()
    nets.loss_of(model, data).backward()
    with pytest.raises(RuntimeError, match=r"second gradient of .*cannot be accumulated"):
        nets.loss_of(model, nets.batch()).backward()
    assert all(p.grad is None for p in model.parameters())
    torch.autograd.grad(nets.loss_of(model, nets.batch()), [model.fc.weight])  # not counted
    imp.update()
    assert all(map(torch.equal, imp.compute().values(), plain.compute().values()))
    with pytest.raises(RuntimeError, match="no layer's gradient came since the last update"):
        imp.update()
    nets.loss_of(model, nets.batch()).backward()
    imp.skip()
    nets.loss_of(model, data).backward()  # what was skipped does not stand in its way
    imp.update()
    assert imp.standard_error()["fc"].abs().max() < 1e-6 * imp.compute()["fc"].max()


def test_a_gradient_from_before_is_an_error_and_stays():
    model, data = mixed()
    nets.backward(model, data)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    imp = tk.Importance(model, "taylor_fo", stream=True)
    with pytest.raises(RuntimeError, match=r"a gradient from before.*zero_grad"):
        nets.loss_of(model, data).backward()
    assert all(p.grad.equal(before[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="was not streamed"):
        imp.update()
    model.zero_grad()
    model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))
    nets.loss_of(model, data).backward()
    with pytest.raises(RuntimeError, match=r"fc.weight has a gradient that was not streamed"):
        imp.update()


@pytest.mark.parametrize(
    ("criterion", "why"),
    [
        ("taylor_fo_gate", r"inside tk.scoring\(model\)"),
        ("magnitude_l2", "reads the weights alone"),
        ("bn_scale", "needs no backward"),
        ("taylor_so_diag", "runs the model itself"),
    ],
)
def test_criteria_without_weight_gradients_have_none_to_stream(criterion, why):
    model, _ = mixed()
    with pytest.raises(ValueError, match=f"stream: '{criterion}'.*{why}"):
        tk.Importance(model, criterion, stream=True)
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("spoiled", ["plain.weight", "stem_bn.bias"])
def test_a_scaler_counts_the_same_minibatches(spoiled):
    model, batches = nets.mixed(), [nets.batch() for _ in range(4)]
    found = []
    for stream in (False, True):
        twin = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
        imp = tk.Importance(twin, "taylor_fo", scaler=scaler, stream=stream)
        for number, data in enumerate(batches):
            twin.zero_grad()
            loss = nets.loss_of(twin, data)
            if number == 1:  # one gradient overflows, that of a scored layer or of another
                loss = loss + math.inf * twin.get_parameter(spoiled).sum()
            scaler.scale(loss).backward()
            imp.update()
        assert imp.overflowed == 1
        found.append(imp)
    check_same(*found)


def test_ranks_stream_gradients_of_their_own():
    def run(rank, size, meeting):
        found = []
        for stream in (False, True):
            model, ranks = runs.network(), ThreadRanks(meeting, rank, gradients="local")
            imp = tk.Importance(model, "taylor_fo", ranks=ranks, stream=stream)
            for of_ranks in runs.parts([[3, 5]] * 2):
                runs.update(imp, model, of_ranks[rank])
            found.append(imp.compute())
        with pytest.raises(ValueError, match=r"ranks: .* pass Ranks\(gradients='local'\)"):
            tk.Importance(model, "taylor_fo", ranks=ThreadRanks(meeting, rank), stream=True)
        return found

    for plain, streamed in in_threads(2, run):
        assert all(map(torch.equal, plain.values(), streamed.values()))


def test_a_copy_and_a_meter_that_is_gone_leave_gradients_alone():
    model, data = mixed()
    imp = tk.Importance(model, "taylor_fo", stream=True)
    twin = copy.deepcopy(model)
    nets.loss_of(twin, data).backward()
    assert twin.fc.weight.grad is not None
    del imp
    nets.loss_of(model, data).backward()
    assert torch.equal(model.fc.weight.grad, twin.fc.weight.grad)
