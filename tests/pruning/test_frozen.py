"""Fine-tuning with a part frozen: what no gradient reaches is left out, by name, and stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.pruning import Pruner
from tests.helpers import zoo

GATES = ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher"]
#: Network -> modules whose parameters are frozen, and the layers that no gradient reaches then.
STEMS = {
    "vgg": (["features.0", "features.1"], ["features.0"]),
    "resnet": (["stem"], ["stem.0"]),
    "mobilenet": (["stem"], ["stem.0"]),
    "mlp": (["0"], ["0"]),
}


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter that is trained, as LoRA puts beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def frozen(name):
    model, inputs = zoo.build(name)
    for part in STEMS[name][0]:
        model.get_submodule(part).requires_grad_(False)
    return model, inputs


def prune(model, inputs, pruner, scoring=False):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(200):
        if pruner.done:
            return
        model.zero_grad()
        if scoring:
            with tk.scoring(model):
                zoo.loss(model, zoo.fresh(inputs)).backward()
        else:
            zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        optimizer.step()
    raise AssertionError("the target was not reached")


@pytest.mark.parametrize("criterion", GATES)
@pytest.mark.parametrize("name", STEMS)
def test_a_frozen_stem_is_left_out_by_name(name, criterion):
    model, inputs = frozen(name)
    unread = STEMS[name][1]
    pruner = Pruner(model, inputs, criterion, filters=0.75, every=2, per_step=2)
    with pytest.warns(
        UserWarning, match=r"no gradient reaches the output of .*taylor_fo"
    ) as caught:
        prune(model, inputs, pruner)
    told = [str(w.message) for w in caught if "no gradient" in str(w.message)]
    assert len(told) == 1
    assert all(layer in told[0] for layer in unread)
    zoo.forward(pruner.compact(), inputs)
    # What only frozen layers make stays whole; what others make too is scored by those.
    for layer in unread:
        alone = layer in pruner.skipped
        assert alone == (name in ("vgg", "mlp"))
        assert not alone or "no gradient reaches its output" in pruner.skipped[layer]
        if alone:
            assert pruner.widths[layer] == pruner.original_widths[layer]


@pytest.mark.parametrize("name", STEMS)
def test_units_are_scored_by_the_layers_that_are_read(name):
    """As if the frozen ones, which make the same channels, were not there to be scored."""
    model, inputs = frozen(name)
    twin = copy.deepcopy(model)
    pruner = Pruner(model, inputs, "taylor_fo_bn", filters=0.9, every=1, per_step=1)
    imp = tk.Importance(twin, "taylor_fo_bn", layers=[*pruner.original_widths])
    zoo.loss(model, inputs).backward()
    zoo.loss(twin, inputs).backward()
    with pytest.warns(UserWarning, match="no gradient reaches"):
        imp.update()
    with pytest.warns(UserWarning, match="no gradient reaches"):
        record = pruner.step()
    for layer in STEMS[name][1]:
        assert imp.compute()[layer].isnan().all()
        shown = pruner.scores()[layer]
        assert shown.isnan().all() == (layer in pruner.skipped)
    if name in ("vgg", "mlp"):
        alone = {n: s for n, s in imp.compute().items() if n not in STEMS[name][1]}
        cheapest = min(alone, key=lambda n: alone[n].min())
        assert record.removed == {cheapest: (int(alone[cheapest].argmin()),)}


@pytest.mark.parametrize("criterion", GATES)
def test_inside_scoring_all_is_read(criterion, recwarn):
    model, inputs = frozen("vgg")
    pruner = Pruner(model, inputs, criterion, filters=0.3, every=1, per_step=3)
    prune(model, inputs, pruner, scoring=True)
    assert pruner.widths["features.0"] < pruner.original_widths["features.0"]
    assert not [w for w in recwarn if "no gradient" in str(w.message)]


def test_layers_that_are_unfrozen_later_are_scored_from_then_on():
    model, inputs = frozen("vgg")
    pruner = Pruner(model, inputs, "taylor_fo_bn", filters=0.4, every=2, per_step=1)
    for step in range(9):
        if step == 4:
            model.requires_grad_(True)
        model.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        if step == 0:
            with pytest.warns(UserWarning, match="no gradient reaches"):
                pruner.step()
        else:
            pruner.step()
        read = step >= 5  # the first pruning whose minibatches all had them
        assert ("features.0" in pruner.skipped) != (step >= 4)
        if pruner.history:
            assert pruner.scores()["features.0"].isfinite().any() == read


def test_a_target_that_needs_the_frozen_part_is_an_error():
    model, inputs = frozen("vgg")
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, inputs, "taylor_fo_bn", filters=0.2, every=1)
    zoo.loss(model, inputs).backward()
    with (
        pytest.warns(UserWarning, match="no gradient reaches"),
        pytest.raises(RuntimeError, match=r"filters: cannot be reached without.*features\.0.*scor"),
    ):
        pruner.step()
    assert not pruner.history
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert all("running" in k or "num_batches" in k for k in changed)


@pytest.mark.parametrize("criterion", [*GATES, "taylor_fo"])
def test_adapters_beside_frozen_layers(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(Adapted(nn.Linear(6, 12)), nn.BatchNorm1d(12), nn.ReLU()),
        *(Adapted(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 3)),
    )
    model[1].requires_grad_(False)
    inputs = torch.randn(5, 6)
    pruner = Pruner(model, inputs, criterion, filters=0.6, every=2, per_step=2)
    if criterion != "obd_fisher":  # a gate stands where what the adapter adds comes in
        prune(model, inputs, pruner)
    else:
        with pytest.warns(UserWarning, match=r"no gradient reaches the output of 0\.layer,"):
            prune(model, inputs, pruner)
    pruner.compact()(inputs)
    assert model[0].layer.out_features == model[0].up.out_features
