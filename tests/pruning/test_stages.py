"""Stages of shuffles, whose channels change places as some of them go."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.pruning.shuffled_stages import Block, First, Run, drawn_network, staged, with_drawn_norms
from tests.tracing.parts import Apply

SEEDS = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@SEEDS
@given(
    seed=st.integers(0, 2**20),
    residual=st.booleans(),
    criterion=st.sampled_from(["taylor_fo", "taylor_fo_bn"]),
)
def test_compacting_in_between_changes_nothing_but_the_shapes(seed, residual, criterion):
    """Training goes on as that of the masked network, the optimizer's state included."""
    with torch.random.fork_rng():
        model = drawn_network(seed, residual=residual)
        options = {"criterion": criterion, "params": 0.8 if residual else 0.5}
        one, other = Run(model, **options), Run(copy.deepcopy(model), **options)
        # As many residual shuffles as bring all channels back leave the stage as it is.
        assert staged(one.pruner) or residual
        draw = random.Random(seed)
        for _ in range(7):
            x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
            one.step(x)
            other.step(x)
            assert one.pruner.widths == other.pruner.widths
            if draw.random() < 0.5:
                before = one.outputs(x)
                one.pruner.compact()
                torch.testing.assert_close(one.outputs(x), before, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(one.outputs(x), other.outputs(x), rtol=1e-7, atol=1e-7)
        one.pruner.compact()
        other.pruner.compact()
        for (name, mine), theirs in zip(
            one.model.state_dict().items(), other.model.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=name)
        cost = one.pruner._network.meter.cost
        assert cost.params == sum(p.numel() for p in one.model.parameters())


@SEEDS
@given(seed=st.integers(0, 2**20))
def test_a_file_and_a_state_say_in_which_order_channels_lie(tmp_path_factory, seed):
    with torch.random.fork_rng():
        model = drawn_network(seed, scaled=True)
        whole = copy.deepcopy(model)
        run = Run(model, params=0.5)
        x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
        for number in range(5):
            run.step(x)
            if number == 2:
                run.pruner.compact()
        again = Run(copy.deepcopy(whole), params=0.5)
        again.pruner.load_state_dict(run.pruner.state_dict())
        again.model.load_state_dict(run.model.state_dict())
        torch.testing.assert_close(again.outputs(x), run.outputs(x), rtol=0, atol=0)
        for each in (run, again):
            each.pruner.compact()
        torch.testing.assert_close(again.outputs(x), run.outputs(x), rtol=0, atol=0)
        path = tmp_path_factory.mktemp("stages") / "pruned.safetensors"
        tk.save_pruned(path, run.pruner)
        loaded = tk.load_pruned(copy.deepcopy(whole), path)
        torch.testing.assert_close(loaded.eval()(x), run.outputs(x), rtol=0, atol=0)


def kinds_by_running(blocks: int, half: int) -> dict[tuple[int, int], int]:
    """(maker, reader) -> channels, of a stage that PyTorch itself moves the numbers of."""
    found: dict[tuple[int, int], int] = {}
    stream = torch.cat([torch.full((half,), -2), torch.full((half,), -1)])
    for block in range(blocks + 1):
        stream = nn.functional.channel_shuffle(stream.view(1, -1, 1, 1), 2).flatten()
        rest, read = stream.chunk(2) if block < blocks else (stream[:0], stream)
        for maker in read.tolist():
            found[maker, block] = found.get((maker, block), 0) + 1
        stream = torch.cat([rest, torch.full((half,), block)])
    return found


@pytest.mark.parametrize(("blocks", "half"), [(2, 9), (3, 14), (5, 21), (7, 12)])
def test_a_stage_knows_narrower_networks_as_they_are(blocks, half):
    model = nn.Sequential(
        First(3, half, 1), *(Block(half, 1) for _ in range(blocks)), nn.Conv2d(2 * half, 2, 1)
    )
    inputs = torch.randn(1, 3, 3, 3)
    channels = trace(model, inputs).rearranged(model)
    assert channels is not None
    whole = kinds_by_running(blocks, half)
    (stage,) = {group.stage for group in channels.groups} - {None}
    groups = [group for group in channels.groups if group.stage is stage]
    assert sum(group.size for group in groups) == sum(whole.values())
    for width in range(1, half + 1):
        narrow = kinds_by_running(blocks, width)
        if narrow.keys() - whole.keys():
            assert stage.counts[width].max() == -1
        else:
            assert sorted(stage.counts[width].tolist()) == sorted(
                [*narrow.values(), *[0] * (len(whole) - len(narrow))]
            )


SEEN = {
    "its place": lambda x: x * torch.linspace(0.5, 2.0, x.size(1)).view(-1, 1, 1).to(x),
    "neighbours": lambda x: x.cumsum(1),
    "pairs": lambda x: x.unflatten(1, (x.size(1) // 2, 2)).amax(2).repeat_interleave(2, 1),
    "a constant cut": lambda x: torch.cat([x[:, :8].tanh(), x[:, 8:]], 1),
    "a flip": lambda x: x.flip(1),
}


class Seen(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return SEEN[self.what](x)


@pytest.mark.parametrize("what", [*SEEN, "the output", "a norm of groups"])
def test_where_the_order_is_seen_masking_is_removing_all_the_same(what):
    torch.manual_seed(len(what))
    half = 8
    see = nn.GroupNorm(4, 2 * half) if what == "a norm of groups" else nn.Identity()
    inside = Seen(what) if what in SEEN else see
    last = nn.Conv2d(2 * half, 2, 1) if what != "the output" else nn.ReLU()
    model = nn.Sequential(
        First(3, half, 2), Block(half, 2), inside, Block(half, 2), Block(half, 1), last
    ).double()
    run = Run(model, filters=0.8)
    assert not staged(run.pruner)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    for _ in range(4):
        run.step(x)
    before = run.outputs(x)
    run.pruner.compact()
    torch.testing.assert_close(run.outputs(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ignored", ["0.one.0", "2.body.5"])
def test_a_stage_stays_with_a_layer_that_has_to(ignored):
    """And the stage behind it goes."""
    stages = [First(3, 8, 1), *(Block(8, 2) for _ in range(3)), First(16, 8, 1), Block(8, 1)]
    model = nn.Sequential(*stages, Block(8, 1), nn.Conv2d(16, 2, 1)).double()
    run = Run(model, filters=0.9, ignore=[ignored])
    in_step = {
        slot.owner
        for group in run.pruner._prunable.groups
        for slot in group.producers
        if group.schedule is not None
    }
    assert in_step == {"4.one.0", "4.other.0", "5.body.0", "6.body.0"}
    assert all("ignored" in run.pruner.skipped[name] for name in ("0.one.0", "3.body.4"))


def test_a_fault_elsewhere_leaves_a_stage_as_it_is():
    """A head whose code has a width written down keeps its own channels only."""
    written = Apply(lambda self, x: x.view(len(x), 6, 4, 4).tanh())
    stage = [First(3, 9, 1), *(Block(9, 2) for _ in range(4))]
    head = [nn.Conv2d(18, 6, 1), written, nn.Conv2d(6, 2, 1)]
    run = Run(nn.Sequential(*stage, *head).double(), params=0.6)
    assert staged(run.pruner)
    assert run.pruner.skipped.keys() == {"5", "7"}


def test_the_proof_runs_what_is_put_in_order(monkeypatch):
    """Without the new order a cut model is another, and the stage is not offered."""
    monkeypatch.setattr("taylor_kernels.pruning.proof.trial.reorder", lambda *_: None)
    model = nn.Sequential(First(3, 9, 1), *(Block(9, 2) for _ in range(4)), nn.Conv2d(18, 2, 1))
    assert not staged(Run(model.double(), filters=0.9).pruner)
    monkeypatch.undo()
    assert staged(Run(model.double(), filters=0.9).pruner)


class Inside(nn.Module):
    """A stage in the branch of a residual block."""

    def __init__(self, width: int, half: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            First(width, half, 1),
            *(Block(half, 1) for _ in range(3)),
            nn.Conv2d(2 * half, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("per_step", [0.1, 0.3])
def test_a_stage_goes_with_the_block_that_it_is_in(per_step):
    torch.manual_seed(0)
    tail = [nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)]
    blocks = [Inside(6, 10) for _ in range(3)]
    model = with_drawn_norms(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), *blocks, *tail))
    options = {"blocks": True, "per_step": per_step, "criterion": "taylor_fo_bn"}
    run = Run(model, params=0.25, **options)
    assert staged(run.pruner)
    behind = 0  # prunings once a stage that could lose channels has gone with its block
    for _ in range(20):
        network = run.pruner._network
        gone = [
            (group, int((~off).sum()))
            for group, off in zip(network.groups, network.dead, strict=True)
            if group.schedule is not None and not group.producers
        ]
        assert all(group.most_removable(alive) == 0 for group, alive in gone)
        behind += any(len(g.schedule.steps([alive], [g.kind])) > 1 for g, alive in gone)
        x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
        run.step(x)
        if run.pruner.done:
            break
    assert run.pruner.done
    assert behind
    before = run.outputs(x)
    run.pruner.compact()
    torch.testing.assert_close(run.outputs(x), before, rtol=1e-9, atol=1e-9)
    assert run.pruner._network.meter.cost.params == sum(p.numel() for p in model.parameters())


def test_units_that_do_not_go_in_step_are_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(First(3, 9, 1), *(Block(9, 1) for _ in range(4)), nn.Conv2d(18, 2, 1))
    run = Run(copy.deepcopy(model).double(), params=0.5)
    run.step(torch.randn(3, 3, 4, 4, dtype=torch.float64))
    state = run.pruner.state_dict()
    groups = run.pruner._prunable.groups
    number = next(n for n, group in enumerate(groups) if group.schedule is not None)
    off = state["removed"][number].clone()
    off[off.int().argmin()] = True
    state["removed"][number] = off
    again = Run(copy.deepcopy(model).double(), params=0.5)
    with pytest.raises(ValueError, match="in step"):
        again.pruner.load_state_dict(state)
    channels = trace(model, torch.randn(1, 3, 3, 3)).rearranged(model)
    assert channels is not None
    dead = [torch.zeros(group.size, dtype=torch.bool) for group in channels.groups]
    number = next(n for n, group in enumerate(channels.groups) if group.stage is not None)
    dead[number][0] = True
    with pytest.raises(ValueError, match=r"as `Group\.stage` says"):
        channels.without(dead)


@pytest.mark.filterwarnings("ignore:.*no gradient reaches")
@pytest.mark.parametrize("seed", [0, 4, 5])
@pytest.mark.parametrize("kept", [0.3, 0.6])
def test_a_target_out_of_reach_of_a_stage_half_of_which_is_frozen_is_said_at_once(seed, kept):
    """None of its widths comes without channels that have no score."""
    refusals = []
    for frozen in (4, 5, 7):
        run = Run(drawn_network(seed), criterion="taylor_fo_gate", filters=kept)
        assert staged(run.pruner)
        run.model[:frozen].requires_grad_(False)
        x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
        try:
            while not run.pruner.done:
                run.step(x)
        except RuntimeError as error:
            refusals.append((str(error), len(run.pruner.history)))
        run.pruner.close()
    assert refusals or kept > 0.5
    for message, prunings in refusals:
        assert re.match("filters: cannot be reached without filters of 0, 3", message)
        names = message.partition(" of ")[2].partition(", which")[0].split(", ")
        assert len(set(names)) == len(names)
        assert not prunings
