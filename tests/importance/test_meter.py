"""tk.Importance as a meter: what it must not disturb, and what each awkward case does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets

HOOKED = (
    "taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "bn_scale", "oracle",
    "obd_fisher", "obd_fisher_mc", "taylor_so_diag", "obd_bn", "taylor_so_bn", "taylor_so",
    "obd_hutchinson",
)  # fmt: skip


class Twice(nn.Module):
    """One convolution used twice, behind it a BatchNorm the first time and none the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(self.conv(x))))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("criterion", HOOKED)
def test_a_step_under_the_meter_has_the_same_bits(criterion):
    data = [nets.batch() for _ in range(3)]
    model = nets.mixed().float()
    data = [(x.float(), y) for x, y in data]
    bare, metered = copy.deepcopy(model), copy.deepcopy(model)
    imp = tk.Importance(metered, criterion)
    for d in data:
        losses = [nets.backward(m, d) for m in (bare, metered)]
        if imp.needs_closure:
            if criterion != "oracle":  # a forward pass more
                with torch.no_grad():
                    bare(d[0])
            imp.update(closure=lambda d=d: nets.loss_of(metered, d))
        else:
            imp.update()
        assert losses[0].equal(losses[1])
        theirs = gradients(bare)
        assert all(g.equal(theirs[n]) for n, g in gradients(metered).items())
        for m in (bare, metered):
            torch.optim.SGD(m.parameters(), lr=0.1).step()
    imp.close()
    assert all(v.equal(metered.state_dict()[k]) for k, v in bare.state_dict().items())
    assert not any(m._forward_hooks for m in metered.modules())


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher"])
def test_passes_without_gradients_are_not_seen(criterion, caller):
    model, data = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, criterion)
    nets.backward(model, data)
    with caller():
        model(nets.batch()[0])
    imp.update()
    other = tk.Importance(model, criterion)
    nets.backward(model, data)
    other.update()
    for name, score in imp.compute().items():
        assert score.equal(other.compute()[name])


def test_a_layer_used_twice_has_one_gate_over_both_uses():
    model = Twice().double().eval()
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    gate = torch.ones(5, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    bias = model.conv.bias.detach()[:, None, None]
    y = F.relu(gate * model.norm(model.conv(x)))
    y = gate * (model.conv(y) - bias) + bias
    (expected,) = torch.autograd.grad(y.square().sum(), gate)

    imp = tk.Importance(model, "taylor_fo_gate", layers=["conv"])
    model(x).square().sum().backward()
    imp.update()
    torch.testing.assert_close(
        imp.compute()["conv"].double(), expected.flatten(1).square().mean(0), rtol=1e-5, atol=0
    )


def test_gradient_accumulation_sums_minibatches_and_appends_examples():
    model = nets.mixed(train=False)
    parts = [nets.batch(4), nets.batch(4)]
    whole = tuple(torch.cat(p) for p in zip(*parts, strict=True))
    scores = {}
    for name, batches in (("parts", parts), ("whole", [whole])):
        meters = [tk.Importance(model, c) for c in ("taylor_fo", "taylor_fo_bn", "taylor_fo_gate")]
        model.zero_grad()
        for d in batches:
            (nets.loss_of(model, d) * len(d[1]) / 8).backward()
        for meter in meters:
            meter.update()
            meter.close()
        scores[name] = [meter.compute() for meter in meters]
    for got, want in zip(scores["parts"], scores["whole"], strict=True):
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("freeze", ["frozen", "no affine"])
def test_a_batch_norm_without_gradients_is_gated_at_its_output(freeze):
    model, data = nets.mixed(), nets.batch()
    if freeze == "frozen":
        model.stem_bn.requires_grad_(False)
    else:
        model.stem_bn = nn.BatchNorm2d(8, affine=False).double()
    expected = nets.gate_gradient(model, "stem_bn", data).sum(0).square()
    imp = tk.Importance(model, "taylor_fo_bn")
    nets.backward(model, data)
    imp.update()
    torch.testing.assert_close(imp.compute()["stem"].double(), expected, rtol=1e-5, atol=0)


def test_frozen_weights():
    model, data = nets.mixed(), nets.batch()
    model.plain.requires_grad_(False)
    with pytest.warns(UserWarning, match="1 layers with frozen weights are left out: plain"):
        imp = tk.Importance(model, "taylor_fo")
    nets.backward(model, data)
    imp.update()
    assert set(imp.compute()) == {"stem", "grouped", "up", "fc"}
    with pytest.raises(ValueError, match=r"layers: plain have frozen weights.*taylor_fo_gate"):
        tk.Importance(model, "taylor_fo", layers=["plain", "fc"])
    gate = tk.Importance(model, "taylor_fo_gate", layers=["plain"])
    nets.backward(model, data)
    gate.update()
    assert (gate.compute()["plain"] > 0).all()


def test_an_unused_layer_scores_zero_and_an_unused_model_is_an_error():
    model = Twice().eval()
    for criterion in ("taylor_fo", "taylor_fo_bn", "taylor_fo_gate"):
        imp = tk.Importance(model, criterion)
        with pytest.raises(RuntimeError, match=r"no (layer|forward).*loss\.backward"):
            imp.update()
        model(torch.randn(2, 4, 5, 5)).sum().backward()
        imp.update()
        assert imp.compute()["unused"].equal(torch.zeros(2))
        assert (imp.compute()["conv"] > 0).all()
        model.zero_grad(set_to_none=True)
        with pytest.raises(RuntimeError, match=r"no (layer|forward).*loss\.backward"):
            imp.update()
        imp.close()


@pytest.mark.parametrize("criterion", ["taylor_fo", "snip", "taylor_fo_bn", "taylor_fo_gate"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_same_gradients_are_not_scored_twice(criterion, set_to_none):
    model, data = nets.mixed(), nets.batch()
    imp = tk.Importance(model, criterion)
    for _ in range(20):
        model.zero_grad(set_to_none=set_to_none)
        nets.loss_of(model, data).backward()
        imp.update()
    with pytest.raises(RuntimeError, match=r"once after each loss\.backward"):
        imp.update()
    assert imp._totals.updates == 20


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate"])
def test_bfloat16_autocast(criterion):
    model = nets.mixed(train=False).float()
    data = nets.batch(8)
    data = (data[0].float(), data[1])
    scores = []
    for enabled in (False, True):
        imp = tk.Importance(model, criterion)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = nets.loss_of(model, data)
        loss.backward()
        imp.update()
        scores.append(torch.cat(list(imp.compute().values())))
        imp.close()
    relative = (scores[1] - scores[0]).norm() / scores[0].norm()
    assert relative < 0.1, relative


def test_unbatched_inputs_and_tokens():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    imp = tk.Importance(conv, "taylor_fo_gate")
    conv(torch.randn(3, 6, 6)).square().sum().backward()
    imp.update()
    assert imp.compute()["0"].shape == (4,)
    linear = nn.Linear(6, 4)
    x = torch.randn(3, 7, 6)
    imp = tk.Importance(linear, "taylor_fo_gate")
    linear(x).square().sum().backward()
    imp.update()
    grads = [torch.autograd.grad(linear(t).square().sum(), linear.weight)[0] for t in x]
    expected = torch.stack([(g * linear.weight).sum(1) for g in grads]).square().mean(0)
    torch.testing.assert_close(imp.compute()[""], expected.detach(), rtol=1e-4, atol=1e-6)


def test_layers_before_the_first_trained_one_have_no_score():
    model = nets.mixed()
    model.stem.requires_grad_(False)
    model.stem_bn.requires_grad_(False)
    imp = tk.Importance(model, "taylor_fo_gate")
    nets.backward(model, nets.batch())
    with pytest.warns(UserWarning, match=r"output of stem,.*tk\.scoring.*taylor_fo"):
        imp.update()
    scores = imp.compute()
    assert scores["stem"].isnan().all()
    assert all((score > 0).any() for name, score in scores.items() if name != "stem")
    data = nets.batch()
    with tk.scoring(model):
        nets.loss_of(model, data).backward()
    imp.update()
    alone = tk.Importance(model, "taylor_fo_gate")
    with tk.scoring(model):
        nets.loss_of(model, data).backward()
    alone.update()
    assert imp.compute()["stem"].equal(alone.compute()["stem"])  # as if it had been read alone


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher"])
def test_a_model_that_is_frozen_as_a_whole_has_nothing_to_score(criterion):
    model = nets.mixed().requires_grad_(False)
    x, _ = nets.batch()
    imp = tk.Importance(model, criterion)
    weight = torch.ones((), requires_grad=True)
    (model(x) * weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"reaches the output of .* nothing to score.*scoring"):
        imp.update()


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_so_bn", "oracle"])
def test_a_closed_meter_keeps_its_scores_and_takes_no_more(criterion):
    model, data = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, criterion)
    closure = {"closure": lambda: nets.loss_of(model, data)} if imp.needs_closure else {}
    nets.backward(model, data)
    imp.update(**closure)
    before = imp.compute()
    imp.close()
    nets.backward(model, data)
    with pytest.raises(RuntimeError, match="update: the meter is closed; make a new one"):
        imp.update(**closure)
    assert all(score.equal(before[name]) for name, score in imp.compute().items())
