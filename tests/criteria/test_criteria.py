"""Every criterion against its definition, by autograd in float64 on a network with all of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same layers; equal to float32, relative to the layer's greatest score."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].dtype == torch.float32
        scale = want.abs().max()
        torch.testing.assert_close(got[name].double() / scale, want / scale, rtol=0, atol=1e-6)


def mean_over_updates(model, criterion, data, **update) -> dict[str, Tensor]:
    imp = tk.Importance(model, criterion)
    for d in data:
        nets.backward(model, d)
        imp.update(**update)
    scores = imp.compute()
    imp.close()
    return scores


WEIGHT_FORMULAS = {
    "taylor_fo": lambda gw: gw.square().sum(1),
    "taylor_fo_joint": lambda gw: gw.sum(1).square(),
    "taylor_abs": lambda gw: gw.abs().sum(1),
}


@pytest.mark.parametrize("criterion", WEIGHT_FORMULAS)
def test_weight_criteria(criterion):
    model, data = nets.mixed(train=False), [nets.batch() for _ in range(3)]
    expected: dict[str, Tensor] = dict.fromkeys(nets.GATED, 0)
    for d in data:
        nets.backward(model, d)
        for name in expected:
            layer = model.get_submodule(name)
            gw = nets.filters_first(layer, layer.weight.detach() * layer.weight.grad)
            expected[name] = expected[name] + WEIGHT_FORMULAS[criterion](gw) / len(data)
    close(mean_over_updates(model, criterion, data), expected)


def test_snip_shares_sum_to_one_over_the_network():
    model, data = nets.mixed(), nets.batch()
    nets.backward(model, data)
    saliency = {
        name: nets.filters_first(layer, (layer.weight.detach() * layer.weight.grad).abs()).sum(1)
        for name in nets.GATED
        for layer in [model.get_submodule(name)]
    }
    total = sum(s.sum() for s in saliency.values())
    close(mean_over_updates(model, "snip", [data]), {n: s / total for n, s in saliency.items()})


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_taylor_fo_bn_is_the_squared_gate_gradient(train):
    model, data = nets.mixed(train=train), [nets.batch() for _ in range(3)]
    expected = {
        name: sum(nets.gate_gradient(model, gated, d).sum(0).square() for d in data) / len(data)
        for name, gated in nets.GATED.items()
    }
    close(mean_over_updates(model, "taylor_fo_bn", data), expected)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scoring", [True, False], ids=["no weight gradients", "weight gradients"])
def test_taylor_fo_gate_is_the_mean_over_examples_of_the_squared_gate_gradient(train, scoring):
    model, data = nets.mixed(train=train), [nets.batch(n) for n in (6, 6, 3)]
    expected = {}
    for name, gated in nets.GATED.items():
        gates = [nets.gate_gradient(model, gated, d) for d in data]
        if name == gated:  # no BatchNorm: on Σ (y − b)·dy, so without the bias's share
            gates = [g - s for g, s in zip(gates, bias_share(model, name, data), strict=True)]
        expected[name] = torch.cat(gates).square().mean(0)

    imp = tk.Importance(model, "taylor_fo_gate")
    for d in data:
        if scoring:
            with tk.scoring(model):
                nets.loss_of(model, d).backward()
        else:
            nets.backward(model, d)
        imp.update()
    close(imp.compute(), expected)


def bias_share(model: nn.Module, name: str, data: list) -> list[Tensor]:
    """[N, C] per batch: Σ_positions b·dy."""
    layer, outputs, shares = model.get_submodule(name), [], []

    def keep(output: Tensor) -> Tensor:
        outputs.append(output)
        return output * 1  # what follows may work in place

    for d in data:
        with nets.changed_output(layer, keep):
            loss = nets.loss_of(model, d)
        (dy,) = torch.autograd.grad(loss, outputs.pop())
        shares.append(dy.flatten(2).sum(2) * layer.bias if dy.dim() == 4 else dy * layer.bias)
    return [share.detach() for share in shares]


@pytest.mark.parametrize("name", ["plain", "up", "fc"])
def test_taylor_fo_gate_without_bn_is_exact_per_example(name):
    """Against a loop over examples that forms each one's weight gradient."""
    model, data = nets.mixed(train=False), nets.batch(4)
    layer = model.get_submodule(name)
    squares = []
    for n in range(4):
        one = (data[0][n : n + 1], data[1][n : n + 1])
        (g,) = torch.autograd.grad(nets.loss_of(model, one) / 4, layer.weight)
        squares.append(nets.filters_first(layer, g * layer.weight.detach()).sum(1).square())
    imp = tk.Importance(model, "taylor_fo_gate", layers=[name])
    with tk.scoring(model):
        nets.loss_of(model, data).backward()
    imp.update()
    close(imp.compute(), {name: torch.stack(squares).mean(0)})


def test_magnitudes():
    model = nets.mixed()
    rows = {
        name: nets.filters_first(layer, layer.weight.detach())
        for name in nets.GATED
        for layer in [model.get_submodule(name)]
    }
    for criterion, p in (("magnitude_l1", 1), ("magnitude_l2", 2)):
        imp = tk.Importance(model, criterion)
        imp.update()
        close(imp.compute(), {n: r.abs().pow(p).sum(1) for n, r in rows.items()})


def test_bn_scale_is_nan_where_there_is_no_bn():
    model = nets.mixed()
    imp = tk.Importance(model, "bn_scale")
    with pytest.raises(RuntimeError, match="bn_scale: no BatchNorm"):
        imp.update()
    with torch.no_grad():
        model(nets.batch()[0])
    imp.update()
    scores = imp.compute()
    for name, gated in nets.GATED.items():
        if name == gated:
            assert scores[name].isnan().all()
        else:
            scale = model.get_submodule(gated).weight.detach().abs().float()
            torch.testing.assert_close(scores[name], scale)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_oracle_removes_each_filter_for_real_and_leaves_no_trace(train):
    model, data = nets.mixed(train=train), nets.batch()
    with torch.no_grad():
        model(data[0])  # shows which BatchNorm follows which layer
    imp = tk.Importance(model, "oracle")
    with pytest.raises(ValueError, match="closure: 'oracle' runs the model itself"):
        imp.update()
    with torch.no_grad():
        model(data[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    imp.update(closure=lambda: nets.loss_of(model, data))
    scores = imp.compute()
    assert model.training == train
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())

    expected = {}
    model.eval()
    for name, gated in nets.GATED.items():
        squares = []
        for c in range(len(scores[name])):
            copy = nets.mixed(train=False)
            copy.load_state_dict(before)
            removed = copy.get_submodule(gated)
            with torch.no_grad():  # a filter is gone when nothing that makes its output is left
                if name == gated:
                    weight = removed.weight
                    if isinstance(removed, nn.ConvTranspose2d):
                        group, within = divmod(c, weight.size(1))
                        weight.chunk(removed.groups)[group][:, within] = 0
                    else:
                        weight[c] = 0
                    removed.bias[c] = 0
                else:
                    removed.weight[c] = removed.bias[c] = 0
                change = nets.loss_of(copy, data) - nets.loss_of(model, data)
            squares.append(change.square())
        expected[name] = torch.stack(squares)
    close(scores, expected)


@pytest.mark.parametrize(
    "returned", [None, "0.3", torch.zeros(4), torch.tensor(1j)], ids=["none", "str", "4", "complex"]
)
def test_an_oracle_without_a_number_is_one_clear_error(returned):
    model, data = nets.mixed(), nets.batch()
    imp = tk.Importance(model, "oracle")
    with pytest.raises(TypeError, match="closure: expected it to return the loss, a scalar tensor"):
        imp.update(closure=lambda: returned)
    imp.update(closure=lambda: float(nets.loss_of(model, data)))
    assert model.training


def test_random_is_seeded_and_leaves_the_global_generator_alone():
    model = nets.mixed()
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):
        imp = tk.Importance(model, "random")
        imp.update()
        imp.update()
        draws.append(imp.compute())
    assert torch.get_rng_state().equal(state)
    for name, draw in draws[0].items():
        assert draw.equal(draws[1][name])
        assert draw.unique().numel() == draw.numel()


def test_standard_error_over_updates_and_over_examples():
    model, data = nets.mixed(train=False), [nets.batch(5) for _ in range(4)]
    per_update = [mean_over_updates(model, "taylor_fo", [d]) for d in data]
    imp = tk.Importance(model, "taylor_fo")
    gates = tk.Importance(model, "taylor_fo_gate")
    for d in data:
        nets.backward(model, d)
        imp.update()
        gates.update()
    for name, error in imp.standard_error().items():
        scores = torch.stack([s[name] for s in per_update]).double()
        torch.testing.assert_close(error.double(), scores.std(0) / 2, rtol=1e-4, atol=0)
    examples = torch.cat([nets.gate_gradient(model, "stem_bn", d) for d in data]).square()
    torch.testing.assert_close(
        gates.standard_error()["stem"].double(), examples.std(0) / 20**0.5, rtol=1e-5, atol=0
    )
    single = tk.Importance(model, "magnitude_l2")
    single.update()
    assert single.standard_error()["fc"].isnan().all()


@pytest.mark.parametrize("columns", [1, 3])
def test_scores_of_a_minibatch_lie_in_memory_of_their_own(columns):
    """A score function may return a buffer that it goes on to change."""
    buffer = torch.randn(5, columns, dtype=torch.float64)
    criterion = tk.Criterion("kept", "example_gates", lambda table: buffer)
    scores = criterion.minibatch_scores(torch.randn(5, columns, dtype=torch.float64))
    before = scores.clone()
    torch.testing.assert_close(before, buffer.mean(1))
    buffer.zero_()
    assert torch.equal(scores, before)
