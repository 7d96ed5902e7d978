"""Mixtures of experts in stacked parameters: neurons of all experts, and whole experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.pruning.mixtures import NEURONS, WIDTH, Model, Router
from tests.zoo import judging


def cut(model: nn.Module, inputs, criterion: str, params: float, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = tk.Pruner(
        model, inputs, criterion, params=params, every=1, per_step=0.1, optimizer=optimizer,
        **options,
    )  # fmt: skip
    while not pruner.done:
        optimizer.zero_grad()
        judging.loss(model, judging.batch(inputs)).backward()
        pruner.step()
        optimizer.step()
    return pruner, optimizer


@pytest.mark.parametrize("criterion", ["taylor_fo", "magnitude_l2", "taylor_fo_bn"])
@pytest.mark.parametrize(("experts", "top_k", "normalised"), [(5, 2, True), (4, 1, False)])
def test_masked_is_compacted(experts, top_k, normalised, criterion, tmp_path):
    torch.manual_seed(experts)
    model = Model(experts, top_k, normalised)
    model.mixture.gate = Router(experts, top_k, normalised, biased=normalised)
    empty = copy.deepcopy(model)
    model.double()
    inputs = torch.randn(6, 7, 4, dtype=torch.float64)
    pruner, optimizer = cut(model, inputs, criterion, 0.3)
    assert set(pruner.skipped) == {"head"}
    fresh = torch.randn_like(inputs)
    expected = model(fresh)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(fresh), expected, rtol=0, atol=0)
    pruner.compact()
    torch.testing.assert_close(model(fresh), expected, rtol=0, atol=1e-10)
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params
    gate, stacks = model.mixture.gate, model.mixture.experts
    assert top_k <= gate.num_experts == stacks.num_experts == len(gate.weight) == len(stacks.up)
    assert stacks.up.shape == stacks.down.mT.shape
    optimizer.zero_grad()
    model(fresh).square().mean().backward()
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    tk.save_pruned(tmp_path / "pruned", pruner)
    again = tk.load_pruned(empty.double(), tmp_path / "pruned")
    assert torch.equal(again(fresh), model(fresh))


def test_whole_experts_down_to_as_many_as_a_token_goes_to():
    torch.manual_seed(0)
    model = Model().double()
    inputs = torch.randn(3, 7, 4, dtype=torch.float64)
    channels = trace(model, inputs)
    group = next(g for g in channels.groups if g.name == "mixture.gate")
    assert {slot.owner for slot in group.producers} == {"mixture.gate", "mixture.experts"}
    pruner = tk.Pruner(
        model, inputs, "magnitude_l2", params=0.8, min_filters=6
    )  # more than there are experts: they stay
    assert "mixture.gate" in pruner.skipped
    pruner.close()
    keep = ["enter"]  # and with it the width
    pruner = tk.Pruner(
        model, inputs, "magnitude_l2", params=0.1 + 0.9 * 2 / 5, every=1, ignore=keep
    )
    while not pruner.done:
        pruner.step()
    left = pruner.widths["mixture.gate"]
    assert 2 <= left == pruner.widths["mixture.experts"]
    expected = model(inputs)
    whole = pruner.whole.flops
    with pytest.warns(UserWarning, match="new parameters"):
        pruner.compact()
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-10)
    # A token goes through two experts still: their neurons count, and rows of the router.
    tokens, neurons = 21, pruner.widths["mixture.experts.up"]
    rows = pruner.widths["mixture.gate"]
    saved = 2 * tokens * WIDTH * ((5 - rows) + 2 * 2 * (NEURONS - neurons))
    assert whole - pruner.cost.flops == saved


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
def test_models_of_transformers(criterion, kind, implementation):
    hf = pytest.importorskip("transformers", reason="its models are what is pruned here")
    torch.manual_seed(0)
    fused = implementation == "grouped_mm"
    options = dict(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24,
    )  # fmt: skip
    if kind == "Qwen2Moe":
        options |= dict(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
            shared_expert_intermediate_size=12, norm_topk_prob=True,
        )  # fmt: skip
    config = getattr(hf, f"{kind}Config")(**options, experts_implementation=implementation)
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    inputs = {"input_ids": torch.arange(12)[None] % 30, "use_cache": False}
    # Rows in memory are to be a multiple of 16 bytes for the product of all experts at once.
    pruner, _ = cut(model, inputs, criterion, 0.7, round_to=8 if fused else 1)
    name = "model.layers.0.mlp.experts"
    assert {name, f"{name}.gate_up_proj", f"{name}.down_proj"} <= set(pruner.widths)
    assert model.config._experts_implementation == implementation
    model.eval()
    expected = judging.outputs(model, inputs)
    exact = [] if fused else judging.in_double(model, inputs)
    pruner.compact()
    for one, other in zip(judging.outputs(model, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if exact:
        assert judging.distance(exact, judging.in_double(model, inputs)) < 1e-10
