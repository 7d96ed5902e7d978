"""Mixtures of experts in stacked parameters: neurons of all experts, and whole experts."""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.zoo import judging

WIDTH, NEURONS = 8, 6


class Router(nn.Module):
    """Sends each token to its best experts."""

    def __init__(self, experts: int, top_k: int, normalised: bool, biased: bool = False) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.normalised = experts, top_k, normalised
        self.weight = nn.Parameter(torch.randn(experts, WIDTH))
        self.bias = nn.Parameter(torch.randn(experts)) if biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x, self.weight, self.bias)
        values, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        if self.normalised:
            values = values / values.sum(-1, keepdim=True)
        return logits, values, chosen


class Experts(nn.Module):
    """Two stacks of weights."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, NEURONS, WIDTH))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, NEURONS))

    def forward(self, x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            hidden = functional.linear(x[token], self.up[expert]).tanh()
            part = functional.linear(hidden, self.down[expert]) * values[token, place, None]
            y.index_add_(0, token, part)
        return y


class Mixture(nn.Module):
    def __init__(self, experts: int, top_k: int, normalised: bool) -> None:
        super().__init__()
        self.gate = Router(experts, top_k, normalised)
        self.experts = Experts(experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        _, values, chosen = self.gate(flat)
        return self.experts(flat, chosen, values).view_as(x)


class Model(nn.Module):
    def __init__(self, experts: int = 5, top_k: int = 2, normalised: bool = True) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.mixture = nn.LayerNorm(WIDTH), Mixture(experts, top_k, normalised)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.mixture(self.norm(x)))


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


def test_a_masked_expert_is_chosen_by_no_token():
    torch.manual_seed(1)
    model = Model(experts=4).double()
    inputs = torch.randn(5, 6, 4, dtype=torch.float64)
    with torch.no_grad():  # the one that goes first
        for stack in (model.mixture.gate.weight, *model.mixture.experts.parameters()):
            stack[2] *= 1e-4
    assert (model.mixture.gate(model.norm(model.enter(inputs)).flatten(0, 1))[2] == 2).any()
    # The width stays, and with it the norm, so that only the router is run on what is kept.
    pruner = tk.Pruner(
        model, inputs, "magnitude_l2", params=0.6, every=1, per_step=0.1, ignore=["enter"]
    )
    seen: list[tuple[Tensor, Tensor]] = []
    while pruner.widths["mixture.gate"] == 4 and not pruner.done:
        pruner.step()
    model.mixture.gate.register_forward_hook(lambda _, __, out: seen.append((out[0], out[2])))
    dead = ~model.mixture.gate.weight.any(1)
    assert dead[2]
    assert int(dead.sum()) == 4 - pruner.widths["mixture.gate"]
    model(inputs)
    logits, chosen = seen[0]
    assert not torch.isin(chosen, dead.nonzero()).any()
    assert torch.equal(logits.isneginf(), dead.expand_as(logits))
    pruner.close()
    with pytest.raises(ValueError, match=r"its router 'mixture.gate' is run on the"):
        tk.Pruner(model, inputs, "taylor_fo", filters=0.5)


class Routing(NamedTuple):
    by_expert: Any
    values: Tensor
    chosen: Tensor


class OwnRouter(Router):
    def __init__(self, kind: str, experts: int, top_k: int) -> None:
        super().__init__(experts, top_k, normalised=True)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits, values, chosen = super().forward(x)
        by_expert = {
            "logits": lambda: logits,
            "alone": lambda: chosen,
            "probabilities": lambda: logits.softmax(-1),
            "sigmoids": lambda: logits.sigmoid(),
            "counts": lambda: torch.bincount(chosen.flatten(), minlength=self.num_experts),
            "one-hot": lambda: functional.one_hot(chosen, self.num_experts),
            "bool": lambda: functional.one_hot(chosen, self.num_experts).bool(),
        }[self.kind]()
        return by_expert if self.kind == "alone" else Routing(by_expert, values, chosen)


class Balanced(Mixture):
    """A mixture that keeps a loss of load balancing while it trains."""

    def __init__(self, kind: str, experts: int = 6, top_k: int = 2) -> None:
        super().__init__(experts, top_k, True)
        self.gate, self.loss = OwnRouter(kind, experts, top_k), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat, kind = x.flatten(0, -2), self.gate.kind
        routing = self.gate(flat)
        if kind == "alone":
            routing = Routing(None, torch.ones(routing.shape).to(x), routing)
        if self.training and kind in ("logits", "probabilities"):
            held = routing.by_expert
            shares = held if kind == "probabilities" else held.softmax(-1)
            load = functional.one_hot(routing.chosen, held.size(-1)).to(x).mean((0, 1))
            self.loss = (load * shares.mean(0)).sum()
        return self.experts(flat, routing.chosen, routing.values).view_as(x)


def balanced(kind: str) -> tuple[Model, Tensor, tk.Pruner]:
    torch.manual_seed(0)
    model = Model()
    model.mixture = Balanced(kind)
    inputs = torch.randn(6, 7, 4, dtype=torch.float64)
    model.double()
    params = 0.1 + 0.9 * 2 / 6
    return (
        model,
        inputs,
        tk.Pruner(model, inputs, "magnitude_l2", params=params, every=1, ignore=["enter"]),
    )


@pytest.mark.parametrize("kind", ["logits", "alone", "probabilities"])
def test_a_loss_of_load_balancing_is_what_it_is_after_removal(kind):
    model, inputs, pruner = balanced(kind)
    while not pruner.done:
        pruner.step()
    assert pruner.widths["mixture.gate"] < 6
    model.train()
    output, loss = model(inputs), model.mixture.loss
    with pytest.warns(UserWarning, match="new parameters"):
        pruner.compact()
    assert model.mixture.gate.num_experts < 6
    torch.testing.assert_close(model(inputs), output, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.mixture.loss, loss, rtol=0, atol=1e-10)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sigmoids", "no negative number for any expert"),
        ("counts", r"integers of shape \(6,\), which are no numbers of 2 experts"),
        ("one-hot", r"integers of shape \(42, 2, 6\), which are no numbers of 2 experts"),
        ("bool", "bool values"),
    ],
)
def test_a_router_that_returns_something_else_by_expert_keeps_them(kind, reason):
    pruner = balanced(kind)[2]
    assert "mixture.gate" not in pruner.widths
    assert re.search(reason, pruner.skipped["mixture.gate"])


def test_a_router_of_another_form_than_on_the_example_says_so():
    model, inputs, pruner = balanced("logits")
    while not pruner.done:
        pruner.step()
    model.mixture.gate.kind = "alone"
    with pytest.raises(
        RuntimeError, match=r"returns something of another form .* compact\(\) first"
    ):
        model(inputs)


def test_logits_that_are_returned_keep_the_experts():
    class Returning(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.mixture.gate(self.norm(self.enter(x)).flatten(0, 1))[0]

    channels = trace(Returning().double(), torch.randn(2, 3, 4, dtype=torch.float64))
    assert channels.skipped["mixture.gate"] == "reaches the output of the model"


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


class Biased(Experts):
    """Experts with vectors that are added behind each product."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.up_bias = nn.Parameter(torch.randn(experts, NEURONS))
        self.down_bias = nn.Parameter(torch.randn(experts, WIDTH))
        self.gates: tuple[Tensor | float, ...] = 1.0, [1.0] * experts

    def forward(self, x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            hidden = functional.linear(x[token], self.up[expert], self.up_bias[expert])
            hidden = hidden.tanh() * self.gates[0]
            part = functional.linear(hidden, self.down[expert], self.down_bias[expert])
            part = part * values[token, place, None] * self.gates[1][expert]
            y = y.index_add(0, token, part)
        return y


class Gated(Biased):
    """Experts with factors on their neurons, and on what each of them adds."""

    def gate(self) -> tuple[Tensor, Tensor]:
        neurons, experts = torch.ones(NEURONS).to(self.up), torch.ones(self.num_experts).to(self.up)
        self.gates = neurons.requires_grad_(), experts.requires_grad_()
        return self.gates


def passes(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.stack([model(x).tanh().square().sum() for x in batches]).sum()


@pytest.mark.parametrize("several", [False, True], ids=["one pass", "accumulated"])
def test_gates_of_neurons_and_experts(several):
    model = Model()
    model.mixture.experts = Biased(5)
    model.double()
    batches = [torch.randn(3, 7, 4, dtype=torch.float64) for _ in range(1 + several)]
    twin = copy.deepcopy(model)
    twin.mixture.experts.__class__ = Gated
    gates = twin.mixture.experts.gate()
    slopes = torch.autograd.grad(passes(twin, batches), gates)
    neurons, experts = (s.square().float() for s in slopes)
    names = ["mixture.experts.up", "mixture.experts"]
    imp = tk.Importance(model, "taylor_fo_bn", layers=names, example_inputs=batches[0])
    pruner = tk.Pruner(model, batches[0], params=0.9, every=1, ignore=["enter"])
    for x in batches:
        (8.0 * passes(model, [x])).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.125)  # what is done to .grad later does not matter
    imp.update(loss_scale=8.0)
    pruner.step(loss_scale=8.0)
    for found in (imp.compute(), pruner.scores()):
        for name, expected in zip(names, (neurons, experts), strict=True):
            # What has just gone has no score.
            expected = expected.where(~found[name].isnan(), torch.nan)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0, equal_nan=True)
    assert set(pruner.skipped) == {"head", "enter", "mixture.experts.down"}


def test_what_has_no_gradient_has_no_score():
    model, inputs = Model().double(), torch.randn(3, 7, 4, dtype=torch.float64)
    pruner = tk.Pruner(model, inputs, params=0.95, every=1, ignore=["enter"])
    with tk.scoring(model):
        passes(model, [inputs]).backward()
        with pytest.raises(RuntimeError, match=r"mixture.experts: .* nothing to score"):
            pruner.step()
    pruner.close()
    imp = tk.Importance(model, layers=["head", "mixture.experts"], example_inputs=inputs)
    with tk.scoring(model):
        passes(model, [inputs]).backward()
        with pytest.warns(UserWarning, match="mixture.experts: .* inside tk.scoring"):
            imp.update()
    found = imp.compute()
    assert found["mixture.experts"].isnan().all()
    assert (found["head"] > 0).all()


@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "taylor_so_diag"])
def test_experts_have_no_gates_by_example(criterion):
    inputs = torch.randn(3, 7, 4)
    pruner = tk.Pruner(Model(), inputs, criterion, params=0.95)
    for name in ("mixture.gate", "mixture.experts", "mixture.experts.up"):
        assert "only the slope over a minibatch" in pruner.skipped[name]
    assert "enter" in pruner.widths


def test_experts_with_a_norm_of_their_own_stay():
    """It would undo a factor on the weight in front of it."""

    class Normed(Experts):
        def __init__(self) -> None:
            super().__init__(5)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for expert in chosen.unique():
                token, place = torch.where(chosen == expert)
                hidden = functional.linear(x[token], self.up[expert]).tanh()
                part = self.norm(functional.linear(hidden, self.down[expert]))
                y.index_add_(0, token, part * values[token, place, None])
            return y

    model, inputs = Model(), torch.randn(3, 7, 4)
    model.mixture.experts = Normed()
    pruner = tk.Pruner(model, inputs, params=0.95)
    assert "mixture.experts.up" in pruner.widths
    assert {"mixture.experts", "mixture.gate"} <= set(pruner.skipped)
