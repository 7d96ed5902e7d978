"""Runs that prune whole blocks: resumed, taken back, and what they refuse."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.pruning import Pruner
from taylor_kernels.tracing import trace
from tests.pruning.residual_blocks import Basic, Inverted, Scaled, built, make, step, weaken


def random_network(seed: int) -> tuple[nn.Module, int]:
    """Stages of random blocks, with and without projections between; how many can be found."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()]
    width, count = 4, 0
    for _ in range(draw.randint(3, 6)):
        if draw.random() < 0.3:
            parts += [nn.Conv2d(width, width + 2, 3, padding=1), nn.BatchNorm2d(width + 2)]
            width += 2
        parts.append(draw.choice((Basic, Inverted, Scaled))(width))
        count += 1
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)), count


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed, tmp_path):
    model, count = random_network(seed)
    model, x = model.double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    optimizer, pruner = make(model, x, "taylor_fo_bn", params=0.35, per_step=0.2)
    assert len(pruner.blocks) == count
    compacts = random.Random(seed)
    while not pruner.done:
        step(model, optimizer, x, pruner)
        if compacts.random() < 0.5:
            expected = model.eval()(x)
            pruner.compact()
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
            assert sum(p.numel() for p in model.train().parameters()) == pruner.cost.params
    expected = model.eval()(x)
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
    pytest.importorskip("safetensors", reason="pruned models are files of safetensors")
    tk.save_pruned(tmp_path / "it", pruner)
    again = tk.load_pruned(random_network(seed)[0].double(), tmp_path / "it").eval()
    assert torch.equal(again(x), model(x))
    assert repr(again) == repr(model)


@pytest.mark.sample
@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("compacts", [True, False])
def test_killed_and_resumed_is_the_same_run(stop, compacts, tmp_path):
    def start():
        model, x = built("scaled", torch.float32)
        return (model, x, *make(model, x, params=0.3, per_step=0.08, every=2))

    def go_on(model, x, optimizer, pruner, first, last):
        for number in range(first, last):
            generator = torch.Generator().manual_seed(number)
            step(model, optimizer, torch.randn(x.shape, generator=generator), pruner)
            if compacts and number % 3 == 0:
                pruner.compact()

    straight = start()
    go_on(*straight, 0, 12)
    stopped = start()
    go_on(*stopped, 0, stop * 2 + 1)
    assert len(stopped[3].blocks) < 3 or stop == 2
    path = tmp_path / "run.pt"
    tk.save_checkpoint(path, model=stopped[0], optimizer=stopped[2], pruner=stopped[3])
    resumed = start()
    tk.load_checkpoint(path, model=resumed[0], optimizer=resumed[2], pruner=resumed[3])
    assert resumed[3].cost == stopped[3].cost
    assert resumed[3].blocks == stopped[3].blocks
    go_on(*resumed, stop * 2 + 1, 12)
    assert resumed[3].history == straight[3].history
    for one, other in zip(resumed[0].parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_goes_back_to_blocks_that_are_masked_here():
    model, x = built("basic")
    weaken(model, "basic")
    optimizer, pruner = make(model, x, "taylor_fo_bn", params=0.3)
    before, cost = pruner.state_dict(), pruner.cost
    weights = copy.deepcopy(model.state_dict())
    expected = model.eval()(x)
    model.train()
    while len(pruner.blocks) == 3:
        step(model, optimizer, x, pruner)
    pruner.load_state_dict(before)
    model.load_state_dict(weights)
    assert pruner.cost == cost
    assert len(pruner.blocks) == 3
    assert torch.equal(model.eval()(x), expected)


def test_what_stays_says_why():
    class Dense(nn.Module):
        """A branch whose inner value is used later on; a projection in place of the identity."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.enter = nn.Linear(4, 4)
            self.side, self.out = nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            inner = self.one(x)
            y = x + self.two(inner)
            y = self.side(y) + self.two(y.relu())
            return self.out(torch.cat([y, inner], -1))

    model = Dense()
    blocks, others = trace(model, torch.randn(2, 4), blocks=True).find_blocks(model)
    assert not blocks
    assert "used elsewhere" in others[""]
    with pytest.raises(ValueError, match=r"^blocks: the model has no residual block.*elsewhere"):
        Pruner(model, torch.randn(2, 4), params=0.9, blocks=True)
    Pruner(model, torch.randn(2, 4), params=0.9).close()  # nothing has been touched


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"blocks": 1}, TypeError, "blocks: expected True or False"),
        ({"blocks": True, "criterion": "taylor_so_diag"}, ValueError, "none of a whole block"),
        ({"blocks": True, "criterion": "bn_scale"}, ValueError, "none of a whole block"),
        ({"blocks": True, "ignore": ("3", "4", "5")}, ValueError, "is ignored"),
    ],
)
def test_bad_input_is_said_in_one_sentence(options, error, words):
    model, x = built("basic")
    with pytest.raises(error, match=words):
        Pruner(model, x[:1], **({"params": 0.9} | options))
    Pruner(model, x[:1], params=0.9).close()


def test_states_of_other_pruners_are_refused():
    model, x = built("basic")
    plain = Pruner(copy.deepcopy(model), x[:1], "taylor_fo_gate", params=0.4)
    _, pruner = make(model, x)
    with pytest.raises(ValueError, match="blocks=True"):
        plain.load_state_dict(pruner.state_dict())
    with pytest.raises(ValueError, match="blocks=True"):
        pruner.load_state_dict(plain.state_dict())
    damaged = pruner.state_dict()
    damaged["blocks"]["removed"] = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks of blocks"):
        pruner.load_state_dict(damaged)


def test_ignored_blocks_stay():
    model, x = built("basic")
    _, pruner = make(model, x, ignore=("4.conv1",))
    assert pruner.blocks == ("3", "5")
