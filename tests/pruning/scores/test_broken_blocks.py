"""Whole blocks whose scores are not finite, and those that no gradient reaches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner
from tests.pruning.residual_blocks import WIDTH, Feed, built, make


def weighted(model: nn.Module, inputs: Tensor, weight: float = 1.0) -> None:
    """Gradients of a loss times a weight."""
    model.zero_grad()
    (model(inputs).square().mean() * weight).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_gate"])
def test_scores_of_blocks_that_are_not_finite(criterion, only, value):
    model, x = built("basic")
    width = {"min_filters": 10**6} if only else {}
    _, pruner = make(model, x, criterion, params=0.6, every=2, per_step=1, **width)
    weighted(model, x, value)
    assert pruner.step() is None
    weighted(model, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"^blocks 3, 4, 5: 3 of 3 blocks have scores that are"):
        pruner.step()
    assert pruner.blocks == ("3", "4", "5")
    assert not pruner.history
    assert not pruner.block_scores()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    # The broken minibatch is forgotten: what follows is what a pruner without it does.
    again, _ = built("basic")
    _, fresh = make(again, x, criterion, params=0.6, every=2, per_step=1, **width)
    for _ in range(2):
        weighted(model, x)
        weighted(again, x)
        record, wanted = pruner.step(), fresh.step()
    assert record.blocks == wanted.blocks
    assert record.removed == wanted.removed
    assert pruner.block_scores() == fresh.block_scores()
    for name, scores in fresh.scores().items():
        torch.testing.assert_close(pruner.scores()[name], scores, equal_nan=True, rtol=0, atol=0)


def test_one_broken_block_is_named_and_leaves_no_trace_in_the_scores_of_filters():
    """Its gate is not finite where the gradients of its weights are."""
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo", params=0.6, every=1, per_step=1)
    weighted(model, x)
    blocks = pruner._minibatches.blocks
    plain = blocks.of

    def one_infinite(tables, gates):
        found = plain(tables, gates)
        found[1] = torch.inf
        return found

    blocks.of = one_infinite
    with pytest.raises(RuntimeError, match=r"^blocks 4: 1 of 3 blocks have scores"):
        pruner.step()
    assert all(scores.isnan().all() for scores in pruner.scores().values())


def test_a_block_that_another_minibatch_did_not_reach_is_still_broken():
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo", params=0.6, every=2, per_step=1)
    blocks = pruner._minibatches.blocks
    for first, then in ((torch.inf, torch.nan), (torch.nan, torch.inf)):
        blocks.drop()
        blocks.take(torch.tensor([1.0, first, torch.nan], dtype=torch.float64), 1)
        blocks.take(torch.tensor([1.0, then, 1.0], dtype=torch.float64), 1)
        with pytest.raises(RuntimeError, match=r"^blocks 4: 1 of 3 blocks have scores"):
            blocks.check_finite()


def test_blocks_without_a_gradient_stay_and_are_named_where_nothing_else_can_go():
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo_gate", params=0.3, per_step=1, min_filters=10**6)
    hooks = [  # gradients pass these two by
        model[n].bn2.register_forward_hook(lambda module, args, output: output.detach())
        for n in (3, 4)
    ]
    weighted(model, x)
    assert pruner.step().blocks == ("5",)
    weighted(model, x)
    before = copy.deepcopy(model.state_dict())
    words = r"^blocks 3, 4: they alone could go, and none has a score"
    with (
        pytest.warns(UserWarning, match=r"no gradient reaches the output of 3\.conv2, 4\.conv2"),
        pytest.raises(RuntimeError, match=words),
    ):
        pruner.step()
    assert pruner.blocks == ("3", "4")
    assert len(pruner.history) == 1
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    for hook in hooks:
        hook.remove()
    weighted(model, x)
    assert len(pruner.step().blocks) == 1


class Words(nn.Module):
    """A stream that an embedding makes, which is not scored, and that two branches write."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = nn.Sequential(Feed(WIDTH), Feed(WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.embed(x))))


def test_a_stream_whose_scored_layers_have_all_gone_is_named_by_what_reads_it():
    torch.manual_seed(0)
    model, x = Words(), torch.randint(11, (4, 5))
    with torch.no_grad():
        for branch in model.body:
            branch.down.weight.mul_(1e-7), branch.down.bias.mul_(1e-7)
    pruner = Pruner(model, x, "taylor_fo", params=0.1, every=1, per_step=16, blocks=True)
    while pruner.blocks:
        weighted(model, x)
        pruner.step()
    assert not pruner.done
    weighted(model, x)
    words = r"^params: cannot be reached without input channels of head, which .*with their blocks"
    with pytest.raises(RuntimeError, match=words):
        pruner.step()
