"""Norms, embeddings and weights that no layer holds, scored on request."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk

SCORES = {
    "taylor_fo": lambda w, g: (w * g).square(),
    "taylor_abs": lambda w, g: (w * g).abs(),
    "magnitude_l1": lambda w, g: w.abs(),
}


class Scale(nn.Module):
    """A norm of someone's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:]) * self.gain + self.shift


class Experts(nn.Module):
    """A stack of weights, [experts, outputs, inputs], and one whose outputs come last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, width))
        self.down = nn.Parameter(torch.randn(3, 5, width))

    def forward(self, x: Tensor) -> Tensor:
        return sum(functional.linear(x, self.up[e]).tanh() @ self.down[e] for e in range(3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.own = nn.Embedding(7, 6), nn.LayerNorm(6), Scale(6)
        self.experts, self.conv = Experts(6), nn.Conv1d(4, 8, 1, groups=2)
        self.batch_norm, self.head = nn.BatchNorm1d(8), nn.Linear(6, 2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.own(self.norm(self.embed(tokens)))
        x = x + self.attention(x, x, x)[0] + self.experts(x)
        return self.head(self.batch_norm(self.conv(x)))


#: What is named -> its parameters and the dimension that counts filters.
BESIDE = {
    "embed": [("embed.weight", 1)],
    "norm": [("norm.weight", 0), ("norm.bias", 0)],
    "own": [("own.gain", 0), ("own.shift", 0)],
    "batch_norm": [("batch_norm.weight", 0), ("batch_norm.bias", 0)],
    "attention.in_proj_weight": [("attention.in_proj_weight", 0)],
    "attention.in_proj_bias": [("attention.in_proj_bias", 0)],
    "experts.up": [("experts.up", 1)],
    "experts.down": [("experts.down", 2)],
}
TOKENS = torch.arange(20).reshape(5, 4) % 7


def trained() -> nn.Module:
    model = Model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def backward(model: nn.Module) -> None:
    output = model(TOKENS)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()


def rows(values: Tensor, dim: int) -> Tensor:
    return values.movedim(dim, 0).reshape(values.size(dim), -1)


def expected(model: nn.Module, places: list[tuple[str, int]], criterion: str) -> Tensor:
    total: Tensor | float = 0.0
    for name, dim in places:
        parameter = model.get_parameter(name)
        values = SCORES[criterion](parameter.detach(), parameter.grad)
        total = total + rows(values, dim).sum(1)
    return total


@pytest.mark.parametrize(
    ("criterion", "stream"),
    [(c, s) for c in SCORES for s in (False, True) if not (s and c == "magnitude_l1")],
)
def test_scores_are_those_of_float64(criterion, stream):
    """As gradients come (`stream`) too, but of what reads none."""
    model = trained()
    backward(model)
    wanted = {name: expected(model, places, criterion) for name, places in BESIDE.items()}
    model.zero_grad()
    meter = tk.Importance(
        model, criterion, layers=["*", *BESIDE], stream=stream, example_inputs=TOKENS
    )
    backward(model)
    meter.update()
    scores = meter.compute()
    assert {"conv", "head", "attention.out_proj", *BESIDE} == set(scores)
    for name, values in wanted.items():
        torch.testing.assert_close(scores[name].double(), values, rtol=1e-6, atol=1e-9)


def test_a_trace_tells_where_the_outputs_of_a_bare_weight_lie():
    model = trained()
    meter = tk.Importance(model, "taylor_fo", layers=["experts.*"], example_inputs=TOKENS)
    backward(model)
    meter.update()
    scores = meter.compute()
    for name, dim in {"experts.up": 1, "experts.down": 2}.items():
        values = expected(model, [(name, dim)], "taylor_fo")
        torch.testing.assert_close(scores[name].double(), values, rtol=1e-6, atol=1e-9)


class OwnConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight)


class OwnLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Odd(nn.Module):
    """Parameters of which no rule says where filters lie, and a layer of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.positions = nn.LayerNorm((4, 6)), nn.Parameter(torch.randn(1, 4, 6))
        self.pair = nn.Bilinear(6, 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.positions)
        return self.pair(x, x)


def sizes(model: nn.Module, name: str, inputs: Tensor, traced: bool) -> dict[str, int]:
    example = inputs if traced else None
    meter = tk.Importance(model, "taylor_fo", layers=[name], example_inputs=example)
    model(inputs).square().sum().backward()
    meter.update()
    return {key: len(scores) for key, scores in meter.compute().items()}


def test_a_weight_of_many_dimensions_asks_for_a_trace():
    model, images = nn.Sequential(OwnConv(), nn.ReLU()), torch.randn(2, 3, 5, 5)
    with pytest.raises(
        ValueError, match=r"dimension of 0.weight \(8, 3, 3, 3\) .* example_inputs="
    ):
        sizes(model, "0*", images, traced=False)
    assert sizes(model, "0*", images, traced=True) == {"0": 8}


@pytest.mark.parametrize("name", ["norm", "positions"])
@pytest.mark.parametrize("traced", [False, True])
def test_what_has_no_filters_is_an_error(name, traced):
    with pytest.raises(ValueError, match=rf"which dimension of {name}.* its filters lie"):
        sizes(Odd(), f"{name}*", torch.randn(2, 4, 6), traced)


@pytest.mark.parametrize("traced", [False, True])
def test_names_are_the_same_with_a_trace_and_without(traced):
    assert sizes(Odd(), "pair*", torch.randn(2, 4, 6), traced) == {"pair": 5}
    linear = nn.Sequential(OwnLinear(), nn.ReLU())
    assert sizes(linear, "0*", torch.randn(2, 6), traced) == {"0": 5}


def test_second_order_sums_over_all_parts():
    """Σ q², q = g·w − ½·w·(Hw), over scale and shift of a norm."""
    model = trained()
    names = ["norm", "embed", "experts.down"]
    meter = tk.Importance(model, "taylor_so", layers=names, example_inputs=TOKENS)

    def loss() -> Tensor:
        return model(TOKENS).square().sum()

    meter.update(closure=loss)
    places = {n: BESIDE[n] for n in names}
    weights = [model.get_parameter(n) for parts in places.values() for n, _ in parts]
    grads = torch.autograd.grad(loss(), weights, create_graph=True)
    product = sum((g * w.detach()).sum() for g, w in zip(grads, weights, strict=True))
    hvps = dict(zip(weights, torch.autograd.grad(product, weights), strict=True))
    firsts = dict(zip(weights, grads, strict=True))
    for name, parts in places.items():
        total: Tensor | float = 0.0
        for own, dim in parts:
            w = model.get_parameter(own)
            q = (firsts[w] * w - w * hvps[w] / 2).detach()
            total = total + rows(q, dim).square().sum(1)
        found = meter.compute()[name].double()
        torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-6)


def test_none_means_layers_alone():
    """Sums over all that is scored, such as SNIP's, stay what they were."""
    model = trained()
    meter = tk.Importance(model, "taylor_fo")
    backward(model)
    meter.update()
    assert set(meter.compute()) == {"conv", "head", "attention.out_proj"}


def test_what_cannot_be_scored_says_so():
    model = trained()
    with pytest.raises(ValueError, match="'norm' matches no convolution or linear layer; there"):
        tk.Importance(model, "taylor_fo_gate", layers=["norm"])
    with pytest.raises(
        ValueError, match="'nor' matches no convolution or linear layer, norm, embedding or other"
    ):
        tk.Importance(model, "taylor_fo", layers=["nor"])
    model.norm.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="norm have frozen weights"):
        tk.Importance(model, "taylor_fo", layers=["norm"])


def test_the_model_runs_once_however_many_names_are_looked_for():
    """To find what code multiplies by, the model is traced: once for all names."""
    runs = []

    class Counted(Experts):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(x)
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 6), Scale(6), Counted(6), nn.LayerNorm(6))
    for layers in (["1"], ["1", "2.up", "2.d*", "3"]):
        runs.clear()
        tk.Importance(model, "taylor_fo", layers=layers, example_inputs=torch.randn(2, 4))
        assert len(runs) == 1
