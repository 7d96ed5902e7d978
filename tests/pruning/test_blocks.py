"""Whole residual blocks: which are found, what they score, and that removal is what masking was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.pruning.residual_blocks import (
    FOUND,
    KINDS,
    WIDTH,
    Feed,
    built,
    make,
    step,
    tokens,
    weaken,
)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_found_masked_and_removed(kind):
    model, x = built(kind)
    optimizer, pruner = make(model, x)
    assert list(pruner.blocks) == FOUND[kind]
    went: list[str] = []
    while not pruner.done:
        _, record = step(model, optimizer, x, pruner)
        went += record.blocks
        assert record.params == pruner.cost.params
    assert set(went) | set(pruner.blocks) == set(FOUND[kind])
    model.eval()
    expected, cost = model(x), pruner.cost
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == cost.params
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    assert set(optimizer.state) <= set(model.parameters())
    step(model.train(), optimizer, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x[:2])
    assert counter.get_total_flops() == cost.flops


@pytest.mark.parametrize("kind", ["basic", "scaled", "pre-norm"])
def test_training_goes_on_as_it_would_have_masked(kind):
    model, x = built(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weaken(model, kind)
    optimizer, pruner = make(model, x, params=0.5, per_step=0.5)
    while not pruner.done:
        step(model, optimizer, x, pruner)
    assert len(pruner.blocks) < len(FOUND[kind])
    twin_run = []
    state, momenta = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(4):
        twin_run.append(step(model, optimizer, x)[0])
    model.load_state_dict(state)
    optimizer.load_state_dict(momenta)
    pruner.compact()
    for expected in twin_run:
        assert step(model, optimizer, x)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["basic", "inverted", "scaled", "pre-norm"])
@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
def test_a_blocks_gate_is_that_of_a_factor_on_its_branch(kind, criterion):
    model, x = built(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _, pruner = make(model, x, criterion, params=0.9, per_step=1)
    outputs = [block.output.module for block in pruner._network.blocks]
    paths = [block.output.returned for block in pruner._network.blocks]
    twin = copy.deepcopy(model)
    gates = torch.ones(len(x), len(outputs), dtype=x.dtype, requires_grad=True)
    for number, (name, path) in enumerate(zip(outputs, paths, strict=True)):

        def scaled(_, __, output, number=number, path=path):
            gate = gates[:, number]
            if path:
                return (output[0] * gate[:, None, None], *output[1:])
            return output * gate.view(-1, *[1] * (output.dim() - 1))

        twin.get_submodule(name).register_forward_hook(scaled)
    twin(x).square().mean().backward()
    slopes = gates.grad.sum(0) ** 2
    if criterion == "taylor_fo_gate":
        slopes = gates.grad.square().mean(0)
    model(x).square().mean().backward()
    pruner.step()
    found = pruner.block_scores()
    for name, expected in zip(FOUND[kind], slopes.tolist(), strict=True):
        if name in found:
            assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert len(found) >= len(outputs) - 1


@pytest.mark.parametrize("tokens_first", [False, True])
def test_padding_does_not_count_in_the_scores_of_blocks(tokens_first):
    """Of two passes, each with its mask; in dim 0 are sequences, or the tokens of all of them."""
    model, _ = built("pre-norm")
    if tokens_first:
        torch.manual_seed(1)
        model = tokens(Feed(WIDTH), Feed(WIDTH)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    passes = [torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2)]
    if tokens_first:
        masks = [torch.rand(5, 3) < 0.6 for _ in range(2)]
        real = [x[mask] for x, mask in zip(passes, masks, strict=True)]
        passes = [x.flatten(0, 1) for x in passes]
        counts = [mask.flatten() for mask in masks]
    else:
        masks = counts = [torch.arange(5) < n for n in (2, 4)]
        real = [x[mask] for x, mask in zip(passes, masks, strict=True)]
    found = []
    for net, inputs, counted in ((model, passes, counts), (twin, real, None)):
        _, pruner = make(net, passes[0], params=0.9, per_step=1)
        for number, x in enumerate(inputs):
            outputs = net(x) if counted is None else net(x)[counted[number]]
            outputs.square().sum().backward()
        assert pruner.step(mask=None if counted is None else masks) is not None
        found.append(pruner.block_scores())
    assert len(found[0]) >= 1
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_of_weights_a_block_is_the_sum_of_its_filters():
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo", params=0.9, per_step=1)
    model(x).square().mean().backward()
    weights = [(model.get_submodule(f"{n}.conv{k}").weight, n) for n in "345" for k in (1, 2)]
    expected = dict.fromkeys("345", 0.0)
    for weight, name in weights:
        expected[name] += (weight * weight.grad).square().sum().item()
    pruner.step()
    for name, score in pruner.block_scores().items():
        assert score == pytest.approx(expected[name], rel=1e-9)


def test_a_block_that_matters_least_goes_first_and_whole():
    model, x = built("basic")
    with torch.no_grad():
        model[4].bn2.weight.zero_()
        model[4].bn2.bias.zero_()
    lost, whole = (sum(p.numel() for p in part.parameters()) for part in (model[4], model))
    optimizer, pruner = make(model, x, "taylor_fo_bn", params=1 - lost / whole, per_step=0.9)
    _, record = step(model, optimizer, x, pruner)
    assert record.blocks == ("4",)
    assert "4" not in pruner.blocks
    assert pruner.widths["4.conv1"] == 0
    assert record.params == whole - lost
    assert record.done
    pruner.compact()
    assert isinstance(model[4], nn.Identity)


def test_copies_and_closed_pruners_keep_masked_blocks_out():
    model, x = built("scaled")
    weaken(model, "scaled")
    optimizer, pruner = make(model, x, params=0.5, per_step=0.5)
    while not pruner.done:
        step(model, optimizer, x, pruner)
    assert len(pruner.blocks) < 3
    expected = model.eval()(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    pruner.close()
    assert torch.equal(model(x), expected)
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.sample(12)
@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "taylor_fo", "magnitude_l2", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_go_alone_where_no_filter_may(kind, criterion):
    """Every layer is to keep more filters than it has; the state goes to another pruner halfway."""
    model, x = built(kind)
    _, pruner = make(model, x, criterion)
    blocks = pruner._network.blocks
    pruner.close()
    stay = [
        p.numel() for name, p in model.named_parameters() if not any(b.holds(name) for b in blocks)
    ]
    least = sum(stay) / sum(p.numel() for p in model.parameters())
    only = {"params": least + 1e-9, "per_step": 1, "min_filters": 10**6}
    optimizer, pruner = make(model, x, criterion, **only)
    assert pruner.widths == {}
    went: list[str] = []
    while not pruner.done:
        _, record = step(model, optimizer, x, pruner)
        assert record.removed == {}
        assert len(record.blocks) == 1
        went += record.blocks
        if len(went) == 1:
            state, weights = pruner.state_dict(), model.state_dict()
            pruner.close()
            model, _ = built(kind)
            optimizer, pruner = make(model, x, criterion, **only)
            model.load_state_dict(weights)
            pruner.load_state_dict(state)
    assert sorted(went) == sorted(FOUND[kind])
    model.eval()
    expected = model(x)
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params
