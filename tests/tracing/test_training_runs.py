"""Parameters that are read in train mode alone lose the channels that they lie on."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.tracing.run import runs
from tests.zoo import judging


class Masked(nn.Module):
    """Steps of a sequence that are set to a learnt value while training, as wav2vec 2.0 does."""

    def __init__(self, width: int, hidden: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.read = nn.Linear(3, width)
        self.blank = nn.Parameter(torch.randn(width))
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.leave = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        if self.training:
            gone = torch.arange(x.size(1)).expand(len(x), -1) % 2 == 0
            if self.how == "written":
                y[gone] = self.blank.to(y.dtype)
            else:
                y = torch.where(gone[..., None], self.blank.to(y.dtype), y)
        return self.leave(self.body(y))


class Helped(nn.Module):
    """A second head that only training uses, with a layer of its own and one on the trunk."""

    def __init__(self, width: int, hidden: int, how: str) -> None:
        super().__init__()
        self.deep = how == "deep"
        self.stem = nn.Sequential(nn.Conv1d(3, width, 3, padding=1), nn.BatchNorm1d(width))
        self.aside = nn.Conv1d(width, hidden, 1)
        self.second = nn.Linear(hidden, 2)
        self.direct = nn.Linear(width, 2)
        self.trunk = nn.Conv1d(width, hidden, 1)
        self.leave = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x.transpose(1, 2)).relu()
        outputs = {"main": self.leave(self.trunk(y).sigmoid().mean(2))}
        if self.training:
            aside = self.second(self.aside(y).tanh().mean(2)) if self.deep else 0
            outputs["second"] = aside + self.direct(y.mean(2))
        return outputs


def in_training(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a float64 copy returns in train mode, without dropout's help."""
    with torch.no_grad():
        return judging.outputs(copy.deepcopy(model).double().train(), x.double())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "how", "stay"),
    [
        (Masked, "written", {"leave"}),
        (Masked, "chosen", {"leave"}),
        (Helped, "deep", {"leave", "aside", "second", "direct"}),
        (Helped, "flat", {"leave", "aside", "second", "direct"}),
    ],
)
def test_what_training_reads_is_cut_with_the_channels_it_lies_on(kind, how, stay, seed):
    draw = random.Random(f"{kind.__name__} {how} {seed}")
    torch.manual_seed(seed)
    model = kind(draw.randint(5, 12), draw.randint(5, 12), how)
    x = torch.randn(3, 6, 3)
    before = copy.deepcopy(model.state_dict())
    pruner, optimizer = judging.new_pruner(model, x, 0.7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(pruner.skipped) == stay
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12


@pytest.mark.parametrize("how", ["deep", "flat"])
def test_masked_is_removed_in_train_mode_too(how):
    torch.manual_seed(0)
    model, x = Helped(9, 7, how), torch.randn(4, 6, 3)
    pruner, _ = judging.new_pruner(model, x, 0.6)
    while not pruner.done:
        sum(out.square().sum() for out in judging.outputs(model, x)).backward()
        pruner.step()
    masked = in_training(model, x)
    pruner.compact()
    assert judging.distance(masked, in_training(model, x)) < 1e-12


def test_a_model_that_does_not_train_on_the_example_is_traced_all_the_same():
    """One example is too few for BatchNorm; what eval mode says is known by then."""
    torch.manual_seed(0)

    class Picky(Masked):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and len(x) < 2:
                raise ValueError("expected more than one example")
            return super().forward(x)

    pruner, _ = judging.new_pruner(Picky(8, 6, "written"), torch.randn(1, 6, 3), 0.7)
    assert "body.1" in pruner.widths


class Centred(nn.Module):
    """A layer beside another while training, and a mean over channels if `mean` says so."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.read, self.beside = nn.Linear(3, 8), nn.Linear(3, 8)
        self.leave = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        if self.training:
            y = y + self.beside(x)
            y = y - y.mean(-1, keepdim=True) if self.mean else y
        return self.leave(y)


@pytest.mark.parametrize("mean", [False, True])
def test_the_proof_compares_outputs_in_train_mode(mean, monkeypatch):
    """It does not take the trace's word: here only for what the layer beside lies along."""
    learn = runs.learn_from_training

    def deaf(recorder, *rest):
        before = len(recorder.record.fixed)
        learn(recorder, *rest)
        del recorder.record.fixed[before:]

    monkeypatch.setattr(runs, "learn_from_training", deaf)
    if mean:
        with pytest.raises(ValueError, match="mixes its channels"):
            judging.new_pruner(Centred(mean), torch.randn(4, 3), 0.5)
    else:
        assert "read" in judging.new_pruner(Centred(mean), torch.randn(4, 3), 0.5)[0].widths
