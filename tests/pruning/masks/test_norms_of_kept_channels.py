"""Norms that are run on kept channels: state of theirs, other forms of what they are given."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk
from taylor_kernels.tracing import trace


class Centred(nn.Module):
    """Subtracts a mean over channels, and what it has learned of each of them in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.register_buffer("running", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        if self.training:
            self.running.lerp_(y.detach().mean(0), 0.3)
        return (y - self.running) * self.gain


class Replacing(Centred):
    """It puts a new buffer in place of the old one."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        if self.training:
            self.running = self.running + 0.3 * y.detach().mean(0)
        return (y - self.running) * self.gain


class Counted(nn.Module):
    """No tensor of it lies along the channels, which an attribute counts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = width
        self.register_buffer("running", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.channels)
        mean = x.mean(1, keepdim=True)
        if self.training:
            self.running.lerp_(mean.detach().mean().view(1), 0.3)
        return x * (mean - self.running)


def masked_pruner(model: nn.Module, x: Tensor) -> tk.Pruner:
    """One whose model has half of its filters masked."""
    pruner = tk.Pruner(model, x, "magnitude_l2", filters=0.5, every=1, per_step=100)
    model(x).square().sum().backward()
    pruner.step()
    return pruner


@pytest.mark.parametrize("norm", [Centred, Replacing, Counted])
def test_buffers_learn_masked_what_they_learn_once_channels_are_removed(norm) -> None:
    width = random.randint(7, 12)
    model = nn.Sequential(
        nn.Linear(6, width), norm(width), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)
    ).double()
    x = torch.randn(5, 6, dtype=torch.double)
    pruner = masked_pruner(model, x)
    assert pruner.widths["0"] < width
    with torch.no_grad():
        model[1].running.zero_()
        masked, begun = model(x), model[1].running.clone()
        kept = [n for n in range(width) if model[0].weight[n].any()]
        pruner.compact()
        model[1].running.zero_()
        torch.testing.assert_close(model(x), masked)
    learned = begun if norm is Counted else begun[kept]
    assert learned.any()
    torch.testing.assert_close(model[1].running, learned)


class Squeeze(nn.Module):
    """A mean over channels, along the first dimension behind the batch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Between(nn.Module):
    """`Squeeze` in the middle, also for inputs of one dimension more."""

    def __init__(self, pool: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Linear(6, width), pool, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.pool(y) if y.dim() == 2 else self.pool(y.transpose(1, 2)).transpose(1, 2)
        return self.last((y[0] if isinstance(y, tuple) else y).relu())


def test_an_input_of_another_form_is_an_error_and_not_another_dimension() -> None:
    width = random.randint(6, 9)
    model = Between(Squeeze(), width)
    masked_pruner(model, torch.randn(5, 6))
    with pytest.raises(RuntimeError, match=r"a Squeeze .* shape \(3, .*compact\(\) first"):
        model(torch.randn(3, width, 6))


def test_an_output_of_another_form_is_an_error() -> None:
    class Telling(Squeeze):
        telling = False

        def forward(self, x: Tensor) -> object:
            found = super().forward(x)
            return (found, x.mean()) if self.telling else found

    model = Between(Telling(), 8)
    pruner = masked_pruner(model, torch.randn(5, 6))
    assert pruner.widths["first"] < 8
    Telling.telling = True
    with pytest.raises(RuntimeError, match=r"a Telling .* returned a tuple.*compact\(\) first"):
        model(torch.randn(5, 6))


def test_a_norm_behind_which_code_views_the_layout_keeps_it() -> None:
    """Of an image whose channels lie innermost a permutation may be viewed."""

    class Rows(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.pool = nn.Conv2d(3, width, 1), Squeeze()
            self.last = nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(self.first(x)).permute(0, 2, 3, 1)
            return self.last(y.view(-1, y.size(-1)))

    width = random.randint(6, 9)
    model = Rows(width).double().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 5, 5, dtype=torch.double).to(memory_format=torch.channels_last)
    pruner = masked_pruner(model, x)
    assert pruner.widths["first"] < width
    masked = model(x)
    pruner.compact()
    torch.testing.assert_close(model(x), masked)


@pytest.mark.parametrize("norm", [None, "affine"])
def test_the_default_criterion_looks_behind_a_norm_of_single_channels(norm) -> None:
    width = random.randint(5, 9)
    model = nn.Sequential(
        *(nn.Conv1d(3, width, 3), nn.GroupNorm(width, width, affine=bool(norm)), nn.ReLU()),
        *(nn.Conv1d(width, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2)),
    ).double()
    x = torch.randn(8, 3, 12, dtype=torch.double)
    pruner = tk.Pruner(model, x, filters=0.5, every=1, per_step=2)
    while not pruner.done:
        model.zero_grad()
        model(x).square().sum().backward()
        pruner.step()
    assert pruner.widths["0"] < width or pruner.widths["3"] < 5
    masked = model.eval()(x)
    pruner.compact()
    torch.testing.assert_close(model(x), masked)


def test_a_padded_encoder_keeps_no_channels_for_its_mask() -> None:
    class Classify(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 16)
            layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True)
            self.encode, self.leave = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.encode(self.embed(x), src_key_padding_mask=x.eq(0))
            return self.leave(y.mean(1))

    tokens = torch.randint(1, 30, (3, 7))
    tokens[1, 5:] = 0
    assert set(trace(Classify(), tokens).skipped) == {"leave"}


@pytest.mark.parametrize("norm", [Centred, Replacing])
def test_buffers_learn_in_training_masked_what_they_learn_compacted(norm):
    """A buffer that code replaces is a new tensor in each run, and has no versions to compare."""
    width, learned, x = random.randint(7, 12), [], torch.randn(5, 6, dtype=torch.double)
    for cut in (False, True):
        torch.manual_seed(width)
        model = nn.Sequential(nn.Linear(6, width), norm(width), nn.Linear(width, 2)).double()
        pruner = masked_pruner(model, x)
        if cut:
            pruner.compact()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        pruner.compact()
        learned.append(model[1].running)
    torch.testing.assert_close(*learned, rtol=1e-10, atol=1e-11)


class Pool(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input * input.amax(-1, keepdim=True)


class ByName(nn.Module):
    """Calls a norm, between two layers, by the name of its argument."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(6, width), norm, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.norm(input=self.enter(x)).tanh())


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, lambda width: nn.GroupNorm(1, width), lambda width: Pool()]
)
def test_norms_called_by_keyword_let_channels_go(norm):
    width = random.randint(7, 12)
    model = ByName(norm(width), width).double()
    x = torch.randn(5, 6, dtype=torch.double)
    pruner = masked_pruner(model, x)
    assert pruner.widths["enter"] < width
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=1e-11, atol=1e-12)


class Shifted(nn.Module):
    """A norm with a buffer along its channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.gain + self.shift


def test_buffers_of_a_norm_are_cut_too():
    model = nn.Sequential(nn.Linear(4, 8), Shifted(8), nn.Linear(8, 3))
    pruner = tk.Pruner(model, torch.randn(1, 4), "random", filters=0.5, every=1, per_step=4)
    model(torch.randn(6, 4)).square().sum().backward()
    pruner.step()
    x = torch.randn(6, 4)
    masked = model(x)
    pruner.compact()
    torch.testing.assert_close(model(x), masked)
    assert model[1].shift.numel() == 4
