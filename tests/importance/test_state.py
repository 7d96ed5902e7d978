"""tk.Importance as an object: what it refuses, what it saves, what copies of its model hold."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.helpers import nets


def test_a_criterion_must_score_filters():
    model, data = nets.mixed(), nets.batch()
    for score, shape in ((lambda t: t, r"shape \(35, 5\)"), (lambda t: t.sum(), r"shape \(\)")):
        imp = tk.Importance(model, tk.Criterion("odd", "moments", score))
        nets.backward(model, data)
        with pytest.raises(ValueError, match=shape):
            imp.update()
    with pytest.raises(TypeError, match="score: expected a function"):
        tk.Criterion("odd", "moments", 3)


def test_layers_are_chosen_by_name():
    model = nets.mixed()
    assert set(tk.Importance(model, "magnitude_l2", layers=["p*", "fc"])._sizes) == {"plain", "fc"}
    with pytest.raises(ValueError, match=r"layers: 'conv9' matches no.*stem"):
        tk.Importance(model, layers=["conv9"])
    with pytest.raises(ValueError, match="layers: expected a sequence"):
        tk.Importance(model, layers="fc")
    with pytest.raises(ValueError, match="model: has no convolution or linear layer"):
        tk.Importance(nn.Sequential(nn.ReLU()))


def test_what_cannot_be_scored_is_said_at_construction():
    model = nets.mixed()
    for arguments, error, message in (
        ((None,), TypeError, "model: expected a torch.nn.Module"),
        ((model, ["taylor_fo"]), TypeError, "criterion: expected a name"),
        ((nn.Sequential(nn.LazyLinear(3)),), ValueError, "model: 0 has no values yet"),
        ((nn.Linear(3, 3, device="meta"),), ValueError, "model: .* the meta device"),
    ):
        with pytest.raises(error, match=message):
            tk.Importance(*arguments)
    with pytest.raises(ValueError, match="layers: is empty"):
        tk.Importance(model, layers=[])
    with pytest.raises(ValueError, match="backend: 'nope' is not one of"):
        tk.Importance(model, backend="nope")
    with pytest.raises(ValueError, match="loss_scale: None"):
        tk.Importance(model).update(loss_scale=None)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_parametrized_weight_is_an_error_that_says_so():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    imp = tk.Importance(model, "taylor_fo")
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight is computed from other parameters"):
        imp.update()


def test_copies_and_files_of_a_metered_model_have_no_live_hooks():
    model, data = nets.mixed(), nets.batch()
    imp = tk.Importance(model, "taylor_fo_gate")
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        nets.backward(other, data)
    with pytest.raises(RuntimeError, match="no forward and backward pass has been seen"):
        imp.update()


def test_reset_and_state_dict():
    model, data = nets.mixed(train=False), [nets.batch() for _ in range(4)]
    imp = tk.Importance(model, "taylor_fo_gate")
    for method in (imp.compute, imp.standard_error):
        with pytest.raises(RuntimeError, match="no update"):
            method()
    for d in data[:2]:
        nets.backward(model, d)
        imp.update()
    file = io.BytesIO()
    torch.save(imp.state_dict(), file)
    file.seek(0)
    resumed = tk.Importance(model, "taylor_fo_gate")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for d in data[2:]:
        nets.backward(model, d)
        imp.update()
        resumed.update()
    for name, score in imp.compute().items():
        assert score.equal(resumed.compute()[name])
    imp.reset()
    with pytest.raises(RuntimeError, match="no update"):
        imp.compute()


def test_a_foreign_state_changes_nothing():
    model = nets.mixed()
    imp = tk.Importance(model, "magnitude_l2")
    imp.update()
    before = imp.compute()
    good = imp.state_dict()
    for bad, message in (
        ({}, "not a state_dict"),
        (good | {"criterion": "taylor_fo"}, "its criterion is 'taylor_fo'"),
        (good | {"filters": {"fc": 5}}, "its filters is"),
        (good | {"sum": torch.zeros(3)}, "sum does not hold"),
        (good | {"counts": [1]}, "counts does not hold"),
        (good | {"counts": 5}, "counts does not hold"),
        (good | {"counts": [None] * 5}, "not whole numbers"),
        (good | {"counts": [-3] * 5}, "not whole numbers"),
        (good | {"updates": "x"}, "not whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            imp.load_state_dict(bad)
    assert all(score.equal(before[name]) for name, score in imp.compute().items())


@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "obd_fisher", "obd_bn", "taylor_so_bn"])
def test_a_layer_that_returns_no_tensor_is_named(criterion):
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.head = Pair(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.pair(x)[0])

    model, x = Net(), torch.randn(5, 4)
    imp = tk.Importance(model, criterion)
    with pytest.raises(TypeError, match="pair returned tuple, not a tensor"):
        imp.update(closure=lambda: model(x).square().mean()) if imp.needs_closure else model(x)
