"""Structures in which channels hang together: what is prunable, and that masked is removed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.masks.masking import Masks
from tests.helpers import zoo
from tests.helpers.structures import STRUCTURES, build

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
}


def train(model, optimizer, inputs, pruner=None):
    optimizer.zero_grad()
    zoo.loss(model, inputs).backward()
    if pruner:
        pruner.step()
    optimizer.step()


@pytest.mark.parametrize("name", STRUCTURES)
def test_only_these_layers_stay(name):
    model, inputs = build(name)
    pruner = Pruner(model, inputs, "magnitude_l2", filters=0.9)
    stays = set() if name == "weight_norm" else STRUCTURES[name][1]  # it has a magnitude
    assert set(pruner.skipped) == stays | {"6"}


@pytest.mark.sample(24)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_compacted_network_trains_on_as_the_masked_one(name, optimizer):
    torch.manual_seed(len(name))
    model, inputs = build(name)
    optim = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, inputs, "taylor_fo", params=0.75, every=2, per_step=0.2, optimizer=optim)
    assert set(pruner.skipped) == STRUCTURES[name][1] | {"6"}
    while not pruner.done:
        train(model, optim, zoo.fresh(inputs), pruner)
    train(model, optim, inputs)

    twin = copy.deepcopy(model)
    twin_optim = OPTIMIZERS[optimizer](twin.parameters())
    twin_optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    masks = Masks(twin, twin_optim)
    masks.set(pruner._network.channels, pruner._network.dead)
    before = sum(p.numel() for p in model.parameters())
    pruner.compact()
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params < before
    for _ in range(2):
        batch = zoo.fresh(inputs)
        torch.testing.assert_close(model(batch), twin(batch), rtol=1e-9, atol=1e-9)
        train(model, optim, batch)
        train(twin, twin_optim, batch)
    torch.testing.assert_close(model(inputs), twin(inputs), rtol=1e-9, atol=1e-9)


#: Whose products of activations are taken to stay as they were.
ESTIMATED = {"packed_heads", "grouped_queries", "fused_grouped_queries", "lstm"}


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in ESTIMATED])
def test_flops_are_those_of_the_compacted_network(name):
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = build(name)
    pruner = Pruner(model, inputs, "magnitude_l2", filters=0.7, every=1, per_step=0.2)
    while not pruner.done:
        zoo.loss(model, inputs).backward()
        pruner.step()
    pruner.compact()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.eval()(inputs)
    assert counter.get_total_flops() == pruner.cost.flops


def test_a_pruned_structure_is_saved_and_loaded(tmp_path):
    """Attributes and shared tensors are part of the structure that a checkpoint restores."""
    from taylor_kernels.pruning import load_checkpoint, save_checkpoint

    for name in ("c2f", "tied", "packed_heads", "lstm", "weight_norm"):
        model, inputs = build(name)
        optim = OPTIMIZERS["adam"](model.parameters())
        options = {"params": 0.8, "every": 1, "per_step": 0.1}
        pruner = Pruner(model, inputs, "magnitude_l2", **options, optimizer=optim)
        while not pruner.done:
            train(model, optim, inputs, pruner)
            pruner.compact()
        save_checkpoint(tmp_path / name, model=model, optimizer=optim, pruner=pruner)
        again, _ = build(name, seed=3)
        its_optim = OPTIMIZERS["adam"](again.parameters())
        its = Pruner(again, inputs, "magnitude_l2", **options, optimizer=its_optim)
        load_checkpoint(tmp_path / name, model=again, optimizer=its_optim, pruner=its)
        assert torch.equal(again.eval()(inputs), model.eval()(inputs))
        train(model.train(), optim, inputs)
        train(again.train(), its_optim, inputs)
        assert torch.equal(again.eval()(inputs), model.eval()(inputs))


def test_a_layer_of_pytorch_that_no_one_calls():
    """nn.MultiheadAttention uses the weight of its out_proj itself."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.mix = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.enter(x)
            return self.down(torch.relu(self.up(self.mix(x, x, x)[0])))

    by_weights = Pruner(Attention(), torch.randn(2, 5, 4), "taylor_fo", params=0.9)
    heads = "mix.in_proj_weight"
    assert set(by_weights.widths) == {"enter", heads, "mix.out_proj", "up"}
    by_gates = Pruner(Attention(), torch.randn(2, 5, 4), "taylor_fo_gate", params=0.9)
    assert by_gates.widths == by_weights.widths
    at_layers = Pruner(Attention(), torch.randn(2, 5, 4), "obd_fisher", params=0.9)
    assert "used by 'mix', which does not call it" in at_layers.skipped["mix.out_proj"]
    assert "a weight that no layer holds" in at_layers.skipped[heads]
    assert set(at_layers.widths) == {"enter", "up"}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_default_criterion_prunes_what_criteria_of_weights_do(name):
    widths = []
    for criterion in ("taylor_fo", "taylor_fo_bn", "taylor_fo_gate"):
        model, inputs = build(name)
        pruner = Pruner(model, inputs, criterion, filters=0.99, verify=False)
        widths.append({owner: pruner.widths[owner] for owner in sorted(pruner.widths)})
    trained, by_gates, by_example = widths
    # Computed weights hold no gradient, and have gates.
    assert trained.items() <= by_gates.items()
    # What is read inside of a recurrent layer has none by example.
    inside = {owner for owner in by_gates if owner.startswith("2.rnn.")}
    assert bool(inside) == (name == "lstm")
    assert by_example == {owner: by_gates[owner] for owner in by_gates.keys() - inside}
