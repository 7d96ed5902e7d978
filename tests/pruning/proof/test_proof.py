"""What no trace can see is tried, and what a model does outside of arithmetic is no fault of it."""

from __future__ import annotations

import copy
import dataclasses
import random
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.proof import check
from taylor_kernels.pruning.proof.exchanged import Exchanged
from taylor_kernels.pruning.proof.trial import Trial
from tests.tracing.pieces import Apply


def pictures(function, width: int, **modules: nn.Module | nn.Parameter) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 1), Apply(function, **modules), nn.Conv2d(width, 4, 1), nn.Flatten(),
        nn.Linear(4 * 9, 2),
    )  # fmt: skip


def pruned(model: nn.Module, inputs: Any = None, **options) -> Pruner:
    inputs = torch.randn(2, 3, 3, 3) if inputs is None else inputs
    return Pruner(model, inputs, "magnitude_l2", filters=0.9, **options)


def by_hand(x: Tensor, split: int) -> Tensor:
    """Channels before `split` go another way, in numbers that no tensor knows of."""
    out = x.clone()
    for channel in range(x.shape[1]):
        part = x.select(1, channel)
        out.select(1, channel).copy_(part.relu() if channel < split else part.sigmoid())
    return out


#: Where channels part ways, by the width: a half, a constant, and so on from either end.
BOUNDARIES = {
    "half": lambda c: c // 2,
    "third": lambda c: c // 3,
    "four": lambda c: 4,
    "all but three": lambda c: c - 3,
    "one": lambda c: 1,
    "last": lambda c: c - 1,
    "even": lambda c: c // 4 * 2,
}


@pytest.mark.parametrize("width", [8, 9, 12, 15])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_code_that_parts_channels_by_their_number(name, width):
    """Whatever is offered, removing the smallest filters of one side is masking them."""
    boundary = BOUNDARIES[name]
    for blend in (
        lambda s, x: torch.where(
            torch.arange(x.shape[1])[:, None, None] < boundary(x.shape[1]), x.relu(), x.sigmoid()
        ),
        lambda s, x: by_hand(x, boundary(x.shape[1])),
        lambda s, x: (
            x
            * torch.tensor([1.0 + (i < boundary(x.shape[1])) for i in range(x.shape[1])]).view(
                -1, 1, 1
            )
        ),
        lambda s, x: torch.cat(
            [x[:, : boundary(x.shape[1])].relu(), x[:, boundary(x.shape[1]) :].sigmoid()], 1
        ),
    ):
        for side in (slice(None, width // 3), slice(-(width // 3), None)):
            model = pictures(blend, width)
            with torch.no_grad():
                model[0].weight[side] *= 1e-3
            inputs = torch.randn(2, 3, 3, 3)
            pruner = Pruner(model, inputs, "magnitude_l2", filters=0.7, every=1, per_step=1)
            while not pruner.done:
                model(inputs).sum().backward()
                pruner.step()
            masked = model.eval()(inputs)
            torch.testing.assert_close(pruner.compact()(inputs), masked, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass
class Slots:
    __slots__ = ("codes", "logits")
    logits: Tensor
    codes: Tensor


class Box:
    """An output that refers back to itself."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        self.self = self


class Answers(nn.Module):
    """Two paths to outputs; what the first one's are wrapped in is up to a function."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 18), nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu()).relu()
        return self.wrap(self.c(y), y)


CONTAINERS = {
    "tuple": lambda out, other: (out, other),
    "nested": lambda out, other: {"a": [out, {"b": (other,)}], "n": None, "k": 3},
    "slots": lambda out, other: Slots(out, other),
    "back reference": lambda out, other: Box(out=out, other=other),
    "set": lambda out, other: frozenset([out, other.sum()]),
}
#: What shows of a hidden tensor [N, 18] in an output, though it is no floating-point number.
SHADOWS = {
    "argmax": lambda y: y.argmax(1),
    "bool": lambda y: y[:, :9].sum(1) > y[:, 9:].sum(1) * torch.linspace(0.2, 4, 50)[:, None],
    "rounded": lambda y: (y.cumsum(1)[:, :3] * 100).long(),
    "count": lambda y: torch.zeros(len(y), dtype=torch.int64) + y.shape[1],
    "complex": lambda y: torch.fft.fft(y, dim=1)[:, :2],
    "sparse": lambda y: y.cumsum(1)[:, :3].to_sparse(),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shadow", SHADOWS)
def test_every_output_counts(container, shadow):
    torch.manual_seed(0)  # a bool shows a difference by luck
    model = Answers(lambda out, y: CONTAINERS[container](out, SHADOWS[shadow](y)))
    pruner = pruned(model, torch.randn(200, 3))
    assert "b" in pruner.skipped
    assert "a" in pruner.widths


RANDOM = {
    "dropout": lambda s, x: F.dropout(x, 0.5, training=True),
    "dropout of channels": lambda s, x: F.dropout2d(x, 0.5, training=True),
    "noise": lambda s, x: x + 0.1 * torch.randn_like(x),
    "gates": lambda s, x: x * (torch.rand_like(x) > 0.3),
    "bernoulli": lambda s, x: (
        x * torch.bernoulli(torch.full(x.shape[:1], 0.5))[:, None, None, None]
    ),
    "in place": lambda s, x: x + torch.empty_like(x).uniform_(-1, 1),
    "alpha dropout": lambda s, x: F.alpha_dropout(x, 0.2, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_chance_is_no_reason(name):
    torch.manual_seed(3)
    model = pictures(RANDOM[name], 8)
    state = torch.get_rng_state()
    pruner = Pruner(model, torch.zeros(2, 3, 3, 3), "magnitude_l2", filters=0.9)
    assert set(pruner.skipped) == {"4"}
    assert torch.equal(state, torch.get_rng_state())
    # Where chance hides a fault, the fault is still found.
    faulty = pictures(lambda s, x: by_hand(RANDOM[name](s, x), x.shape[1] // 2), 8)
    assert "0" in pruned(faulty).skipped


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant):
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = pictures(
        lambda s, x: x + checkpoint(s.block, x, use_reentrant=reentrant), 8, block=block
    )
    assert set(pruned(model).skipped) == {"4"}


def test_a_part_that_cannot_be_followed_costs_that_part_only():
    def lost(self: nn.Module, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2) if not x.is_meta else x

    model = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), Apply(lost), nn.Linear(6, 5), nn.Linear(5, 2)
    )
    pruner = pruned(model, torch.randn(4, 3))
    assert set(pruner.widths) == {"0", "4"}
    assert "numpy" in pruner.skipped["2"]


def test_two_slices_of_a_video():
    runs = 0

    def frames(self: nn.Module, x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        n, t = x.shape[:2]
        y = self.conv(x.flatten(0, 1)).view(n, t, 8, *x.shape[-2:])
        parts = [y[:, :, :2].relu(), y[:, :, 2:4].sigmoid(), y[:, :, 4:]][: self.parts]
        return torch.cat(parts, 2).flatten(0, 1)

    for parts, width in ((2, 4), (3, 8)):
        module = Apply(frames, conv=nn.Conv2d(3, 8, 1))
        module.parts = parts
        model = nn.Sequential(module, nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
        runs = 0
        pruner = pruned(model, torch.randn(2, 3, 3, 4, 4))
        assert runs < 40  # trying every set of eight channels takes hundreds
        assert {"1"} <= set(pruner.widths) <= {"0.conv", "1"}


def test_layers_that_work_in_another_precision():
    model = nn.Sequential(
        nn.Linear(3, 8), Apply(lambda s, x: F.softmax(x.half().float() @ s.mix, -1) @ s.mix.mT,
                               mix=nn.Parameter(torch.randn(8, 5))),
        nn.ReLU(), nn.Linear(8, 6), Apply(lambda s, x: x.to(torch.bfloat16).to(torch.float32)),
        nn.Linear(6, 2),
    )  # fmt: skip
    skipped = pruned(model, torch.randn(4, 3)).skipped
    assert set(skipped) == {"1.mix", "5"}
    assert "softmax" in skipped["1.mix"]


def test_buffers_that_a_forward_pass_changes():
    def counted(self: nn.Module, x: Tensor) -> Tensor:
        self.runs.add_(1)
        self.seen.mul_(0.9).add_(x.mean((0, 2, 3)))
        return x * self.runs + self.seen[:, None, None]

    middle = Apply(counted)
    middle.register_buffer("runs", torch.zeros(()))
    middle.register_buffer("seen", torch.zeros(8))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 2, 1))
    before = copy.deepcopy(model.state_dict())
    assert set(pruned(model).skipped) == {"2"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Square(nn.Module):
    """Takes images of one size only, and counts what it is given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.size, self.given = size, {"right": 0, "wrong": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.given["right" if x.size(-1) == self.size else "wrong"] += 1
        if x.size(-1) != self.size:
            raise ValueError(f"images must be {self.size} wide")
        return self.layers(x)


def test_an_example_that_cannot_be_cut_down_is_refused_in_few_runs(monkeypatch):
    """Of those that are smaller, no other one is run without masks once that was no help; the whole
    one is run with masks at once: those and three removals; and as it is, since the code asks for
    sizes."""
    model = Square(random.randrange(24, 48))
    counts = []
    restored = Exchanged.restored

    @contextmanager
    def counted(run):
        with restored(run):
            given = run._model.given
            before = dict(given)
            try:
                yield
            finally:
                counts.append({kind: given[kind] - before[kind] for kind in given})

    monkeypatch.setattr(Exchanged, "restored", counted)
    assert pruned(model, torch.randn(1, 3, model.size, model.size)).widths == {"layers.0": 8}
    assert sum(count["wrong"] for count in counts) <= 3
    assert sum(count["right"] for count in counts) == 5


def test_time_is_bounded(monkeypatch):
    """Groups that no run has proven are left out, and the message says how to go on."""
    monkeypatch.setattr(check, "SECONDS", 0.0)
    model = pictures(lambda s, x: x.relu(), 8)
    with pytest.raises(ValueError, match=r"not proven within 0 seconds; pass smaller example"):
        pruned(model)
    assert set(pruned(model, verify=False).skipped) == {"4"}


def test_a_few_faults_among_many_groups_cost_few_runs(monkeypatch):
    runs = []
    fault = Trial.fault
    monkeypatch.setattr(
        Trial, "fault", lambda self, *a, **kw: runs.append(1) or fault(self, *a, **kw)
    )
    odd = Apply(lambda s, x: x.view(len(x), 8))  # a width that no attribute holds
    layers = []
    for number in range(40):
        layers += [nn.Linear(8, 8), odd if number in (7, 30) else nn.ReLU()]
    pruner = pruned(nn.Sequential(*layers, nn.Linear(8, 2)), torch.randn(3, 8))
    assert set(pruner.skipped) == {"14", "60", "80"}
    assert len(runs) < 40


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_that_are_nothing_when_cut_down(size):
    """A proof cuts them to a sixteenth of their area, where a single place has no variance."""
    pool = Apply(lambda _, x: x / (1 + x.var((2, 3), keepdim=True)))
    model = nn.Sequential(
        nn.Conv2d(3, 8, size // 4, size // 4), pool, nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    inputs = torch.rand(2, 3, size, size)
    assert model(inputs).isfinite().all()
    pruner = pruned(model, inputs)
    assert set(pruner.widths) == {"0", "2"}


def test_an_assertion_without_a_message_is_named():
    def asserting(_, x):
        if x.shape[1] != 8:
            raise AssertionError
        return x

    model = nn.Sequential(nn.Linear(4, 8), Apply(asserting), nn.Linear(8, 6), nn.Linear(6, 2))
    pruner = pruned(model, torch.randn(3, 4))
    assert set(pruner.widths) == {"2"}
    assert "AssertionError at 'raise AssertionError' in test_proof.py" in pruner.skipped["0"]
