"""AdaptivePruner: layers and blocks go by their own distributions; what is removed was masked."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_kernels as tk
from taylor_kernels.methods import AdaptivePruner
from taylor_kernels.studies.networks import DigitsResNet


def built(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    model = DigitsResNet(6, 2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    given = {"params": 0.5, "strength": 0.02, "every": 4} | options
    example = torch.zeros(1, 1, 8, 8, dtype=dtype)
    return model, optimizer, AdaptivePruner(model, example, optimizer=optimizer, **given)


def train(model, optimizer, pruner, numbers, *, autocast=False):
    dtype = next(model.parameters()).dtype
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(0, 10, (16,), generator=generator)
        images = torch.randn(16, 1, 8, 8, generator=generator).to(dtype)
        images += labels[:, None, None, None].to(dtype) / 5
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        pruner.step()
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_what_is_removed_is_what_was_masked():
    model, optimizer, pruner = built()
    number = 0
    while not pruner.done:
        train(model, optimizer, pruner, [number])
        if number % 23 == 22:
            pruner.compact()  # in the middle of the run too, with the gates going on
        number += 1
        assert number < 1000
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    expected = model.eval()(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    gates = pruner.gates
    blocks = [name for record in pruner.history for name in record.blocks]
    assert blocks
    assert len(blocks) + len(gates) == 4
    pruner.compact()
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params
    assert pruner.cost.params <= 0.5 * pruner.whole.params
    assert all(isinstance(model.get_submodule(name), nn.Identity) for name in blocks)
    assert not any(m._forward_hooks for m in model.modules())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    train(model.train(), optimizer, pruner, range(2))  # fine-tuning
    shares = {n: w / pruner._prunable.widths[n] for n, w in pruner.widths.items() if w}
    assert len({round(share, 2) for share in shares.values()}) > 1  # proportions nobody set


@pytest.mark.parametrize("stop", [3, 18])
def test_killed_and_resumed_is_the_same_run(stop):
    straight = built(dtype=torch.float32, params=0.1)
    train(*straight, range(stop))
    if stop == 18:
        straight[2].compact()
    train(*straight, range(stop, 26))
    model, optimizer, pruner = built(dtype=torch.float32, params=0.1)
    train(model, optimizer, pruner, range(stop))
    if stop == 18:
        pruner.compact()
    file = io.BytesIO()
    torch.save([one.state_dict() for one in (pruner, model, optimizer)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = built(seed=5, dtype=torch.float32, params=0.1)
    for one, state in zip((resumed[2], resumed[0], resumed[1]), states, strict=True):
        one.load_state_dict(state)
    assert resumed[2].cost == pruner.cost
    train(*resumed, range(stop, 26))
    assert resumed[2].history == straight[2].history
    assert not straight[2].done
    assert resumed[2].gates == straight[2].gates
    if stop == 18:
        straight[2].compact()
        resumed[2].compact()
    for one, other in zip(resumed[0].parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layers_threshold_is_its_own():
    model, optimizer, pruner = built(every=1, params=0.2, strength=1e-6, tolerance=0.01)
    few = model.blocks[0].bn1.weight
    with torch.no_grad():
        few[torch.tensor([1, 4])] = 1e-3
        model.blocks[2].bn1.weight.mul_(1e-3)  # small, but all alike: nothing stands out
    train(model, optimizer, pruner, [0])
    (record,) = pruner.history
    assert record.removed == {"blocks.0.conv1": (1, 4)}
    assert not record.blocks


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_gate_follows_its_gradient_and_its_penalty(scale):
    model, _optimizer, pruner = built()
    torch.manual_seed(1)
    images, labels = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8)
    kept = {}
    handles = [
        model.get_submodule(f"{name}.bn2").register_forward_hook(
            lambda _, __, output, name=name: kept.__setitem__(name, output) or output.retain_grad()
        )
        for name in pruner.gates
    ]
    (F.cross_entropy(model(images), labels) * scale).backward()
    for handle in handles:
        handle.remove()
    expected = {}
    for name, output in kept.items():
        filters = sum(m.out_channels for m in model.get_submodule(name).modules()
                      if isinstance(m, nn.Conv2d))  # fmt: skip
        slope = (output * output.grad).sum().item() / scale
        expected[name] = 1 - 0.05 * slope - 0.05 * 0.02 * filters
    norms = {n: p.clone() for n, p in model.named_parameters() if ".bn" in n and "weight" in n}
    pruner.step(loss_scale=scale)
    for name, gate in pruner.gates.items():
        assert gate == pytest.approx(expected[name], rel=1e-5)
    for name, before in norms.items():
        torch.testing.assert_close(model.get_parameter(name), before - 0.05 * 0.02)


def test_a_block_whose_gate_is_gone_goes():
    model, optimizer, pruner = built(every=1, params=0.2, strength=1e-6, tolerance=0.01)
    pruner._block_gates.gates.data[2] = 0
    name = list(pruner.gates)[2]
    train(model, optimizer, pruner, [0])
    assert pruner.history[0].blocks == (name,)
    assert name not in pruner.gates
    assert pruner.widths[f"{name}.conv1"] == 0


def test_in_bfloat16_autocast():
    model, optimizer, pruner = built(dtype=torch.float32)
    train(model, optimizer, pruner, range(12), autocast=True)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert 0 < min(pruner.gates.values()) < 1


class Own(nn.Module):
    """Beside what can be pruned: an embedding, a norm of the output, a frozen norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.one, self.bn = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.two, self.frozen = nn.Linear(8, 7), nn.BatchNorm1d(7)
        self.out, self.last = nn.Linear(7, 3), nn.BatchNorm1d(3)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        x = self.bn(self.one(self.embed(x))).relu()
        return self.last(self.out(self.frozen(self.two(x)).relu()))


def test_what_it_does_not_concern_is_left_alone():
    torch.manual_seed(0)
    model = Own()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.01)
    pruner = AdaptivePruner(
        model, torch.arange(4), optimizer=optimizer, params=0.9, blocks=False, every=1
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(torch.arange(5)).square().sum().backward()
    pruner.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= {"bn.weight", "bn.bias", "one.weight", "one.bias", "two.weight"}
    assert "bn.weight" in changed
    assert "trains" in pruner.skipped["two"]
    pruner.close()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0}, "strength: expected a number above 0"),
        ({"growth": 0.9}, "growth: expected 1 or more"),
        ({"tolerance": 1.0}, "tolerance: expected a share"),
        ({"params": None}, "none is given"),
        ({"every": 0}, "every: expected an integer"),
        ({"optimizer": None}, "optimizer: the penalty follows"),
        ({"blocks": True}, "blocks: the model has no residual block"),
    ],
)
def test_bad_input_is_said_in_one_sentence(options, words):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {"optimizer": optimizer, "params": 0.5, "blocks": False} | options
    with pytest.raises(ValueError, match=words):
        AdaptivePruner(model, torch.randn(2, 4), **given)
    tk.Pruner(model, torch.randn(2, 4), params=0.5).close()  # nothing has been touched


def test_models_without_scales_and_states_of_others_are_refused():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="has a norm behind it"):
        AdaptivePruner(
            plain, torch.randn(2, 4), params=0.5, blocks=False,
            optimizer=torch.optim.SGD(plain.parameters(), 0.1),
        )  # fmt: skip
    _, _, pruner = built()
    with pytest.raises(ValueError, match="state: it is no state_dict"):
        pruner.load_state_dict({"version": 1})


def test_gates_that_are_not_finite_are_said():
    _model, _optimizer, pruner = built(every=1)
    pruner._block_gates.gates.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="its gate is nan"):
        pruner.step()
    assert not pruner.history
