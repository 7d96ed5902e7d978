"""A masked network is the removed one: in what it computes, and in how it trains on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.masks.masking import Masks
from taylor_kernels.pruning.removing.removal import lookup
from tests.helpers import zoo

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
}


def train(model, optimizer, inputs, pruner=None, steps=1):
    losses, record = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = zoo.loss(model, inputs)
        loss.backward()
        record = pruner.step() if pruner else None
        optimizer.step()
        losses.append(loss.item())
    return losses, record


def pruned_once(name, optimizer="sgd", fraction=0.45, **options):
    """A model of the zoo in float64, in training, with a good part of its filters masked."""
    torch.manual_seed(len(name))
    model, inputs = zoo.build(name, torch.float64)
    optim = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(
        model, inputs, "taylor_fo", params=0.05 + fraction, every=3, per_step=0.4,
        optimizer=optim, **options,
    )  # fmt: skip
    while not pruner.history:
        train(model, optim, zoo.fresh(inputs), pruner)
    return model, inputs, optim, pruner


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_are_the_same(name, mode):
    model, inputs, _, pruner = pruned_once(name)
    inputs = zoo.fresh(inputs)
    model.train(mode == "train")
    masked = copy.deepcopy(model)
    expected = zoo.forward(masked, inputs)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert pruner.compact() is model
    assert model.training == (mode == "train")
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params < sum(sizes.values())
    got = zoo.forward(model, inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet", "unet_grouped", "odd", "resnext"])
def test_training_goes_on_without_a_jump(name, optimizer):
    model, inputs, optim, pruner = pruned_once(name, optimizer)
    batches = [zoo.fresh(inputs) for _ in range(4)]
    train(model, optim, batches[0])
    twin = copy.deepcopy(model)
    twin_optim = OPTIMIZERS[optimizer](twin.parameters())
    twin_optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    masks = Masks(twin, twin_optim)  # a copy has none, and the twin is to stay masked
    masks.set(pruner._network.channels, pruner._network.dead)

    pruner.compact()
    held = {id(p) for group in optim.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for parameter, state in optim.state.items():
        assert id(parameter) in held
        assert all(t.shape in (parameter.shape, ()) for t in state.values() if t is not None)

    for batch in batches[1:]:
        compact_loss, _ = train(model, optim, batch)
        masked_loss, _ = train(twin, twin_optim, batch)
        assert compact_loss == pytest.approx(masked_loss, rel=1e-10)
    model.eval(), twin.eval()
    torch.testing.assert_close(
        zoo.forward(model, batches[0]), zoo.forward(twin, batches[0]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["resnet", "vgg", "two_inputs"])
def test_compact_between_backward_and_step(name):
    model, inputs, optim, pruner = pruned_once(name)
    batch = zoo.fresh(inputs)
    optim.zero_grad()
    zoo.loss(model, batch).backward()
    pruner.step()
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    twin_optim = OPTIMIZERS["sgd"](twin.parameters())
    twin_optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    pruner.compact()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    optim.step()
    twin_optim.step()
    torch.testing.assert_close(
        zoo.forward(model, batch), zoo.forward(twin, batch), rtol=1e-10, atol=1e-10
    )


def masked_entries(pruner):
    """Tensor, dimension, indices and fill of everything that is masked."""
    channels = pruner._network.channels
    for name, cuts in channels.entries(pruner._network.dead).items():
        for dim, index in cuts.items():
            yield name, dim, index, channels.fills.get(name, {}).get(dim, 0.0)


@pytest.mark.parametrize("known", [True, False])
def test_masks_stay_off_whatever_the_optimizer_does(known):
    """Momentum gathered before the first pruning, weight decay, and no more pruner.step()."""
    model, inputs = zoo.build("vgg", torch.float64)
    optim = torch.optim.SGD(model.parameters(), 0.1, momentum=0.95, weight_decay=0.1)
    pruner = Pruner(
        model, inputs, params=0.5, every=4, per_step=0.9, optimizer=optim if known else None
    )
    while not pruner.done:
        train(model, optim, zoo.fresh(inputs), pruner)
    for _ in range(5):
        train(model, optim, zoo.fresh(inputs))
        for p in model.parameters():
            assert p.grad is not None
    zoo.forward(model, zoo.fresh(inputs))
    seen = list(masked_entries(pruner))
    assert {name.split(".")[-1] for name, *_ in seen} == {
        "weight", "bias", "running_mean", "running_var",
    }  # fmt: skip
    for name, dim, index, fill in seen:
        assert fill == (1.0 if name.endswith("running_var") else 0.0)
        assert (lookup(model, name).index_select(dim, index) == fill).all(), name
    if known:
        for parameter in optim.state:
            kept = (parameter != 0) | (optim.state[parameter]["momentum_buffer"] == 0)
            assert kept.all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_nobody_zeroes_moves_nothing_behind_a_step(nesterov):
    """The pruner is not told of the optimizer, whose momentum pushes masked entries on."""
    model, inputs = zoo.build("resnet", torch.float64)
    optim = torch.optim.SGD(model.parameters(), 0.1, momentum=0.95, nesterov=nesterov)
    pruner = Pruner(model, inputs, params=0.5, every=4, per_step=0.9)
    while not pruner.done:
        train(model, optim, zoo.fresh(inputs), pruner)
    parameters = dict(model.named_parameters())
    entries = [
        (parameters[name], dim, index)
        for name, dim, index, _ in masked_entries(pruner)
        if name in parameters
    ]
    pushing = 0
    for _ in range(3):
        train(model, optim, zoo.fresh(inputs), pruner)
        for parameter, dim, index in entries:  # right behind the step, with no pass between
            assert not parameter.index_select(dim, index).any()
            momentum = optim.state[parameter]["momentum_buffer"]
            pushing += bool(momentum.index_select(dim, index).any())
    assert pushing > len(entries)


def test_masked_gradients_are_zero_though_activations_are_not():
    model, inputs, optim, pruner = pruned_once("vgg")  # sigmoid(0) reaches the next weights
    optim.zero_grad()
    zoo.loss(model, zoo.fresh(inputs)).backward()
    grads = dict(model.named_parameters())
    checked = 0
    for name, dim, index, _ in masked_entries(pruner):
        if name in grads:
            assert not grads[name].grad.index_select(dim, index).any(), name
            checked += 1
    assert checked > 5


def test_two_forwards_before_one_backward():
    """The masks are written between the two, which must not touch what the first one saved."""
    model, inputs, _, _ = pruned_once("resnet")
    model.zero_grad()
    (zoo.loss(model, zoo.fresh(inputs)) + zoo.loss(model, zoo.fresh(inputs))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.parameters())


def test_compact_any_time_and_again():
    torch.manual_seed(3)
    model, inputs = zoo.build("resnet", torch.float64)
    optim = OPTIMIZERS["adam"](model.parameters())
    pruner = Pruner(model, inputs, "taylor_fo", flops=0.4, every=2, per_step=0.08, optimizer=optim)
    before = zoo.forward(model.eval(), inputs)
    pruner.compact()
    assert torch.equal(zoo.forward(model, inputs), before)
    model.train()
    while not pruner.done:
        _, record = train(model, optim, zoo.fresh(inputs), pruner)
        if record and len(pruner.history) % 2:
            model.eval()
            expected = zoo.forward(model, inputs)
            pruner.compact()
            torch.testing.assert_close(zoo.forward(model, inputs), expected, rtol=0, atol=1e-12)
            pruner.compact()
            model.train()
    pruner.compact()
    assert not model._forward_pre_hooks
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params
    train(model, optim, zoo.fresh(inputs), pruner, steps=2)


def test_compacting_on_the_way_changes_nothing():
    """The same filters go, whether the model is compacted at every pruning or at the end."""
    results = []
    for early in (True, False):
        torch.manual_seed(5)
        model, inputs = zoo.build("mobilenet", torch.float64)
        optim = OPTIMIZERS["sgd"](model.parameters())
        pruner = Pruner(
            model, inputs, params=0.5, every=3, per_step=0.1, optimizer=optim, round_to=2
        )
        while not pruner.done:
            _, record = train(model, optim, zoo.fresh(inputs), pruner)
            if record and early:
                pruner.compact()
        pruner.compact()
        results.append(([r.removed for r in pruner.history], zoo.forward(model, inputs)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-9)


def test_removed_filters_are_numbered_as_in_the_original():
    torch.manual_seed(7)
    model, inputs = zoo.build("densenet", torch.float64)
    first = {name: module.weight.detach().clone() for name, module in model.named_modules()
             if isinstance(module, nn.Conv2d)}  # fmt: skip
    optim = torch.optim.SGD(model.parameters(), 0.0)
    pruner = Pruner(model, inputs, "magnitude_l2", params=0.6, every=1, per_step=2)
    while not pruner.done:
        train(model, optim, zoo.fresh(inputs), pruner)
        pruner.compact()
    for layer, width in pruner.original_widths.items():
        gone = {f for record in pruner.history for f in record.removed.get(layer, ())}
        kept = [f for f in range(width) if f not in gone]
        assert len(kept) == pruner.widths[layer]
        # Without training, what is left are rows of the original (on the columns that are left).
        rows = model.get_submodule(layer).weight.detach()
        assert rows.size(0) == len(kept)
        for row, number in zip(rows, kept, strict=True):
            assert set(row.flatten().tolist()) <= set(first[layer][number].flatten().tolist())


def test_frozen_flags_and_memory_format_survive():
    model, inputs = zoo.build("resnet")
    model = model.to(memory_format=torch.channels_last)
    model.blocks[0].two[0].weight.requires_grad_(False)
    model.down[1].bias.requires_grad_(False)
    pruner = Pruner(model, inputs, params=0.5, every=1, per_step=0.9)
    while not pruner.done:
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
    pruner.compact()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"blocks.0.two.0.weight", "down.1.bias"}
    conv = model.last.two[0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert not conv.is_contiguous()


def test_what_cannot_be_cut_is_said_before_anything_is():
    model, inputs = zoo.build("mlp")
    optim = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, inputs, params=0.5, every=1, per_step=0.9, optimizer=optim)
    while not pruner.done:
        train(model, optim, zoo.fresh(inputs), pruner)
    weight = model[2].weight
    optim.state[weight]["factor"] = torch.zeros(7, 7)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=r"optimizer: its state 'factor' of '2.weight'.*\(7, 7\)"):
        pruner.compact()
    assert [p.shape for p in model.parameters()] == shapes
    del optim.state[weight]["factor"]
    pruner.compact()
