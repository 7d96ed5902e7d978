"""Every rank prunes the same filters, those that one process would prune."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk
from tests.distributed import runs
from tests.distributed.launch import ran
from tests.distributed.prunings import (
    STEPS,
    alike,
    alone,
    ended,
    part,
    same_bits,
    started,
    step_of,
)
from tests.distributed.threads import Averaged, Meeting, ThreadRanks, in_threads
from tests.pruning.mixtures import WIDTH, Mixture

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:compact\(\) has put new parameters"),
]
CRITERIA = ["taylor_fo_bn", "taylor_fo", "taylor_fo_gate", "obd_fisher", "taylor_so_diag_exact"]


def in_thread(rank, size, meeting, criterion, options):
    ranks = ThreadRanks(meeting, rank, **options)
    model, optimizer, pruner = started(criterion, ranks)
    wrapped = Averaged(model, ranks)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
    return ended(model, pruner) | {"dropped": pruner.dropped}


@pytest.mark.parametrize(
    ("criterion", "window"),
    [(one, 64) for one in (*CRITERIA, "magnitude_l2", "obd_hutchinson")]
    + [("taylor_fo_bn", 2), ("taylor_fo", 2)],
)
def test_the_filters_that_one_process_prunes(criterion, window):
    found = in_threads(2, in_thread, criterion, {"window": window})
    alike(found[0], alone(criterion))
    same_bits(found)


class Tokens(nn.Module):
    """An attention of PyTorch, and a mixture of stacked experts, on the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mixture = Mixture(4, 2, True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images.flatten(2).mT)
        x = x + self.attention(x, x, x)[0]
        return self.head((x + self.mixture(x)).mean(1))


OF_TOKENS = {"per_step": 6, "ignore": ["enter"], "filters": 0.4}


def tokens_in_thread(rank, size, meeting, criterion, models):
    ranks = ThreadRanks(meeting, rank)
    model, optimizer, pruner = started(criterion, ranks, models[rank], **OF_TOKENS)
    wrapped = Averaged(model, ranks)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
    return ended(model, pruner)


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
def test_heads_and_experts_are_those_that_one_process_prunes(criterion):
    torch.manual_seed(0)
    model = Tokens()
    copies = [copy.deepcopy(model) for _ in range(2)]
    found = in_threads(2, tokens_in_thread, criterion, copies)
    wanted = alone(criterion, model=model, **OF_TOKENS)
    assert any("attention.in_proj_weight" in r.removed for r in wanted["history"])
    by_weight = "mixture.experts.up" in wanted["scores"]
    assert by_weight == (criterion == "taylor_fo_bn")
    alike(found[0], wanted)
    same_bits(found)


def in_process(rank, size, criteria):
    found = {}
    for criterion in criteria:
        ranks = tk.distributed.Ranks(timeout=60)
        model, optimizer, pruner = started(criterion, ranks)
        wrapped = DistributedDataParallel(model)
        for step in range(STEPS):
            step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
            for name, parameter in model.named_parameters():
                layer = name.partition(".")[0]
                gone = pruner.original_widths.get(layer, 0) - pruner.widths.get(layer, 0)
                if gone and name.endswith("weight"):
                    off = (parameter.flatten(1) == 0).all(1)
                    assert int(off.sum()) == gone
                    # Averaging came after they had been zeroed.
                    assert not parameter.grad[off].any()
                    assert not optimizer.state[parameter]["momentum_buffer"][off].any()
        counted = ranks.collectives, ranks.bytes_sent, len(pruner.history)
        result = ended(model, pruner)
        pruner.compact()
        wrapped = tk.distributed.rewrapped(wrapped)
        for step in range(3):
            step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
        trained = torch.cat([p.detach().flatten() for p in model.parameters()])
        found[criterion] = result | {"counted": counted, "trained": trained}
    return found


@pytest.mark.parametrize(("size", "criteria"), [(2, CRITERIA[:1]), (4, CRITERIA[:3])])
def test_under_ddp(size, criteria):
    found = ran(size, in_process, criteria)
    for criterion in criteria:
        ours = [one[criterion] for one in found]
        alike(ours[0], alone(criterion))
        same_bits(ours)
        for one in ours:
            collectives, sent, prunings = one["counted"]
            # The scores, and the masks that came of them: of 24 filters, as many units, 3 layers.
            assert collectives == 2 * prunings
            columns = 3 if criterion == "taylor_fo_bn" else 1
            assert sent == prunings * ((16 + 24 * 3 + 4 * columns * 24 + 3) + 8 * (1 + 3))
            assert torch.equal(one["trained"], ours[0]["trained"])


def test_a_rank_that_ends_early():
    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, optimizer, pruner = started("taylor_fo_bn", ranks)
        wrapped = Averaged(model, ranks)
        records = []
        for step in range(STEPS):
            gone = rank == 1 and step >= 7
            batch = None if gone else part(step, rank, size)
            records.append(step_of(pruner, optimizer, model, wrapped, batch))
        return ended(model, pruner) | {"records": records}

    found = in_threads(2, run)
    same_bits(found)
    assert found[0]["records"] == found[1]["records"]
    assert sum(record is not None for record in found[0]["records"]) == STEPS // 3


def wrapped_before(rank, size):
    model, _, pruner = started("taylor_fo", None)
    pruner.close()
    with pytest.raises(ValueError, match=r"model: DistributedData.*make the pruner of its .module"):
        tk.Pruner(DistributedDataParallel(model), torch.randn(1, 3), params=0.5)


def test_a_wrapper_is_not_pruned():
    ran(2, wrapped_before)


def joining(rank, size):
    """Rank 1 has 7 minibatches of 12."""
    model, optimizer, pruner = started("taylor_fo_bn", tk.distributed.Ranks(timeout=60))
    wrapped = DistributedDataParallel(model)
    with Join([wrapped, tk.distributed.Joining(pruner)]):
        for step in range(7 if rank else STEPS):
            step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
    return ended(model, pruner)


def test_a_rank_that_ends_early_in_the_context_for_it():
    found = ran(2, joining)
    same_bits(found)
    assert len(found[0]["history"]) == STEPS // 3


def test_a_meter_of_one_process_waits_for_nobody():
    with pytest.raises(ValueError, match="meter: it has no ranks="):
        tk.distributed.Joining(started("taylor_fo", None)[2])


def test_a_minibatch_that_a_rank_skips_puts_the_pruning_off():
    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, _, pruner = started("taylor_fo_bn", ranks)
        at = []
        for step in range(8):
            runs.loss_of(model, part(step, rank, size)).backward()
            if (rank, step) == (1, 1):
                pruner.skip()
            elif pruner.step():
                at.append((step, pruner.history[-1].step))
        return ended(model, pruner) | {"at": at, "dropped": pruner.dropped}

    found = in_threads(2, run)
    same_bits(found)
    assert [one["at"] for one in found] == [[(3, 3), (6, 6)]] * 2
    assert [one["dropped"] for one in found] == [1, 1]


def test_nobody_waits_once_all_is_done():
    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, optimizer, pruner = started("taylor_fo_bn", ranks)
        for step in range(STEPS):
            step_of(pruner, optimizer, model, Averaged(model, ranks), part(step, rank, size))
        assert pruner.done
        for _ in range(2 * STEPS):
            pruner.skip() if rank else pruner.step()
        pruner.absent()
        return ranks.collectives

    assert len({*in_threads(2, run)}) == 1


def test_a_rank_that_masks_others_is_found_out():
    def run(rank, size, meeting):
        ranks = ThreadRanks(meeting, rank)
        model, optimizer, pruner = started("taylor_fo_bn", ranks)
        for step in range(STEPS):
            if (rank, step) == (2, 4):
                dead = pruner._network.dead
                for gone in dead[1:]:
                    gone[(~gone).nonzero()[0]] = True
            step_of(pruner, optimizer, model, Averaged(model, ranks), part(step, rank, size))

    with pytest.raises(RuntimeError, match=r"^3: the filters .* on rank 2 .* \(so in 2 of 3"):
        in_threads(4, run)


def test_wrappers_that_cannot_be_made_anew():
    with pytest.raises(TypeError, match="ddp: expected a DistributedDataParallel, got Linear"):
        tk.distributed.rewrapped(nn.Linear(2, 2))


def test_absent_without_ranks():
    with pytest.raises(RuntimeError, match="the pruner has no ranks="):
        started("taylor_fo", None)[2].absent()


def test_wrong_weight():
    with pytest.raises(ValueError, match="weight: 0 is not a positive number"):
        started("taylor_fo", ThreadRanks(Meeting(1), 0))[2].step(weight=0)
