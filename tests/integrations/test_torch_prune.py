"""Pruning methods that carry scores, against PyTorch's own with importance_scores handed over."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import taylor_kernels as tk
from taylor_kernels.integrations.torch_prune import structured, unstructured
from tests.integrations.taylor_scores import places, taylor

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )
    with torch.no_grad():  # no two parameters, and no two scores, are equal
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def backward(model: nn.Module) -> Tensor:
    x = torch.randn(5, 2, 6, 6)
    model(x).square().mean().backward()
    return x


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if name.endswith("_mask")}


def same_masks(model: nn.Module, other: nn.Module) -> None:
    found, expected = masks(model), masks(other)
    assert found.keys() == expected.keys()
    assert expected
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_globally_the_least_scores_go(seed, data):
    """Of any parameters in any order, twice: what is masked stays so, and is counted no more."""
    torch.manual_seed(seed)
    model = network()
    chosen = data.draw(st.lists(st.sampled_from(range(8)), min_size=1, unique=True))
    listed = data.draw(st.booleans())
    amounts = data.draw(st.lists(st.floats(0.05, 0.6), min_size=1, max_size=2))
    backward(model)
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    mine, theirs = ([places(m)[i] for i in chosen] for m in (model, other))
    method = unstructured(model, parameters=mine if listed else None)
    for amount in amounts:
        prune.global_unstructured(mine, method, amount=amount)
        scores = {place: taylor(*place) for place in theirs}
        prune.global_unstructured(
            theirs, prune.L1Unstructured, importance_scores=scores, amount=amount
        )
    same_masks(model, other)


def test_one_parameter_after_the_other_and_removed():
    model = network()
    backward(model)
    method = unstructured(model)
    for _ in range(2):
        before = torch.cat([taylor(*place).flatten() for place in places(model)]).numel()
        for module, name in places(model):
            score = taylor(module, name).flatten()
            left = getattr(module, f"{name}_mask", torch.ones_like(score)).flatten().bool()
            count = round(0.5 * int(left.sum()))
            gone = score.masked_fill(~left, torch.inf).argsort()[:count]
            method.apply(module, name, amount=0.5)
            mask = getattr(module, f"{name}_mask").flatten().bool()
            assert torch.equal(mask, left.index_fill(0, gone, False))
    assert before == sum(p.numel() for p in model.parameters())
    kept = {f"{i}": m.weight.clone() for i, m in enumerate(model) if hasattr(m, "weight")}
    for module, name in places(model):
        prune.remove(module, name)
    assert model.state_dict().keys() == network().state_dict().keys()
    assert all(torch.equal(model[int(i)].weight, weight) for i, weight in kept.items())
    assert any((weight == 0).any() for weight in kept.values())


def test_the_fisher_diagonal_of_a_meter_that_goes_on_after_a_pruning():
    model = network().double().eval()
    fisher = tk.ParameterFisher(model)
    method = unstructured(model, fisher)
    total = dict.fromkeys(places(model), 0.0)
    for batch in range(2):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        model(x).square().mean(1).mean().backward()
        fisher.update()
        for n in range(4):
            loss = model(x[n : n + 1]).square().mean()
            weights = {(m, name): getattr(m, name) for m, name in total}
            for place, g in zip(total, torch.autograd.grad(loss, [*weights.values()]), strict=True):
                total[place] = total[place] + g.square()
        fisher.skip()  # what it has seen of this loop
        for module, name in total:
            weight = getattr(module, name).detach()
            left = getattr(module, f"{name}_mask", torch.ones_like(weight)).bool()
            score = (weight.square() * total[module, name]).masked_fill(~left, torch.inf)
            gone = score.flatten().argsort()[: round(0.4 * int(left.sum()))]
            method.apply(module, name, amount=0.4)
            expected = left.flatten().index_fill(0, gone, False).view_as(left)
            assert torch.equal(getattr(module, f"{name}_mask").bool(), expected), (batch, name)


def test_filters_go_where_they_lie_and_their_scores_may_change_in_between():
    model = network()
    importance = tk.Importance(model, "taylor_fo_gate")
    method = structured(model, importance)
    axes = {"0": 0, "3": 1, "5": 0}
    gone: dict[str, set[int]] = {name: set() for name in axes}
    for _ in range(2):
        backward(model)
        importance.update()
        for name, scores in importance.compute().items():
            left = [f for f in scores.argsort().tolist() if f not in gone[name]]
            gone[name].update(left[:1])
            method.apply(model.get_submodule(name), "weight", amount=1)
    for name, axis in axes.items():
        layer = model.get_submodule(name)
        rows = layer.weight.movedim(axis, 0).flatten(1)
        assert {i for i, row in enumerate(rows) if not row.any()} == gone[name]
        assert len(gone[name]) == 2
        prune.remove(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)


def test_a_pruned_model_is_copied_and_saved():
    model = network()
    backward(model)
    unstructured(model).apply(model[0], "weight", amount=0.5)
    structured(model, {"5": torch.rand(3)}).apply(model[5], "weight", amount=1)
    with torch.no_grad():  # PyTorch copies no weight that has a graph
        model(torch.randn(1, 2, 6, 6))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same_masks(twin, model)
        with torch.no_grad():
            twin[0].weight_orig.fill_(1.0)
        twin(torch.randn(1, 2, 6, 6))
        assert torch.equal(twin[0].weight, model[0].weight_mask)
        assert prune.remove(twin[5], "weight").weight.shape == (3, 100)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "0.weight: has no scores"),
        ({"0.weight": torch.rand(2, 2)}, r"of shape \(2, 2\), not \(6, 2, 3, 3\)"),
        ({"0.weight": torch.full((6, 2, 3, 3), -1.0)}, "negative or nan"),
        ({"0.weight": torch.full((6, 2, 3, 3), torch.nan)}, "negative or nan"),
        (None, "0.weight: has no gradient"),
    ],
)
def test_bad_scores_change_nothing(scores, message):
    model = network()
    before = list(model.state_dict())
    method = unstructured(model, (lambda: scores) if scores is None else scores)
    with pytest.raises((ValueError, RuntimeError), match=message):
        method.apply(model[0], "weight", amount=0.5)
    with pytest.raises((ValueError, RuntimeError), match=message):
        prune.global_unstructured([(model[0], "weight")], method, amount=0.5)
    assert list(model.state_dict()) == before


def test_what_cannot_be_told_apart_is_listed():
    """Two norms that nothing has moved yet have the same values; a list says which is which."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.LayerNorm(4))
    model(torch.randn(8, 4)).pow(4).mean().backward()
    norms = [(model[1], "weight"), (model[3], "weight")]
    with pytest.raises(ValueError, match=r"several of the model's.*unstructured\(parameters=\)"):
        prune.global_unstructured(norms, unstructured(model), amount=3)
    with pytest.raises(ValueError, match="none of the model's"):
        prune.global_unstructured([(nn.Linear(2, 2), "weight")], unstructured(model), amount=3)
    scores = torch.cat([taylor(*place) for place in norms])
    prune.global_unstructured(norms, unstructured(model, parameters=norms), amount=3)
    found = torch.cat([model[1].weight_mask, model[3].weight_mask])
    assert torch.equal(found == 0, scores <= scores.sort().values[2])
    with pytest.raises(ValueError, match="in the same order"):
        prune.global_unstructured(
            [(model[0], "weight")], unstructured(model, parameters=norms), amount=3
        )


def test_structured_pruning_of_what_has_no_filters():
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    method = structured(model, {"0": torch.rand(4)})
    with pytest.raises(ValueError, match="transposed convolution with groups"):
        method.apply(model[0], "weight", amount=1)
    for place in ((model[1], "weight"), (model[0], "bias"), (nn.Linear(2, 2), "weight")):
        with pytest.raises(ValueError, match="convolutions and linear layers"):
            method.apply(*place, amount=1)
    for make in (structured, unstructured):
        with pytest.raises(TypeError, match="scores: expected"):
            make(model, 3)
    with pytest.raises(TypeError, match="unstructured"):  # PyTorch's own
        prune.global_unstructured([(model[0], "weight")], method, amount=1)
