"""Channels that LayerNorm, RMSNorm, GroupNorm and their like normalise together."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk


class Own(nn.Module):
    """A norm of a class that nobody knows: as many language models have one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.gain


class Stream(nn.Module):
    """Blocks around a residual stream: a norm before each, one at the end."""

    def __init__(self, norm, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, width) for _ in range(2))
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        return self.out(self.norms[2](x).mean(1))


class Pictures(nn.Module):
    """Convolutions with GroupNorm, and one with LayerNorm along the channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(groups, 12)
        self.b, self.last = nn.Conv2d(12, 12, 3, padding=1), nn.LayerNorm(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.norm(self.a(x))))
        return self.out(self.last(x.permute(0, 2, 3, 1)).mean((1, 2)))


def tokens(n: int = 6) -> Tensor:
    return torch.randint(0, 20, (n, 7))


MODELS = {
    "layer norm": (lambda: Stream(nn.LayerNorm), tokens),
    "rms norm": (lambda: Stream(nn.RMSNorm), tokens),
    "a class of one's own": (lambda: Stream(Own), tokens),
    "group norm": (lambda: Pictures(1), lambda n=6: torch.randn(n, 3, 6, 6)),
    "group norm of four": (lambda: Pictures(4), lambda n=6: torch.randn(n, 3, 6, 6)),
}


def by_hand(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of a float64 copy in eval mode."""
    with torch.no_grad():
        return (
            copy.deepcopy(model)
            .double()
            .eval()(inputs.double() if inputs.is_floating_point() else inputs)
        )


def trained(model, batch, pruner, optimizer, steps: int = 12) -> None:
    for _ in range(steps):
        x = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(0, 5, (len(x),))).backward()
        pruner.step()
        optimizer.step()


def spread(model: nn.Module) -> None:
    """Away from ones and zeros, under which much is the same that is not."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.sample(8)
@pytest.mark.parametrize("criterion", ["random", "taylor_fo", "taylor_fo_gate"])
@pytest.mark.parametrize("name", MODELS)
def test_masked_is_removed_and_training_goes_on(name, criterion):
    make, batch = MODELS[name]
    model = make()
    spread(model)
    first = [parameter.numel() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = tk.Pruner(
        model, batch(1), criterion, params=0.5, every=1, per_step=3, optimizer=optimizer
    )
    assert set(pruner.skipped) == {"out"}
    trained(model, batch, pruner, optimizer)
    assert pruner.done
    inputs = batch()
    masked = by_hand(model, inputs)
    pruner.compact()
    torch.testing.assert_close(by_hand(model, inputs), masked, rtol=1e-10, atol=1e-10)
    left = [parameter.numel() for parameter in model.parameters()]
    assert sum(left) <= 0.5 * sum(first)
    norms = [n for n, (name, _) in enumerate(model.named_parameters()) if "norm" in name]
    assert criterion != "random" or any(left[n] < first[n] for n in norms)
    trained(model, batch, pruner, optimizer, steps=1)


def test_statistics_are_of_the_channels_that_are_kept():
    """The definition, by PyTorch's own LayerNorm of the kept channels."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    spread(model)
    pruner = tk.Pruner(model, torch.randn(1, 4), "random", filters=0.6, every=1)
    while not pruner.done:
        model(torch.randn(6, 4)).square().sum().backward()
        pruner.step()
    kept = model[0].weight.any(dim=1).nonzero().flatten()
    x = torch.randn(6, 4)
    norm = F.layer_norm(
        model[0](x)[:, kept], [len(kept)], model[1].weight[kept], model[1].bias[kept]
    )
    torch.testing.assert_close(model(x), F.linear(norm, model[2].weight[:, kept], model[2].bias))
    over_all = F.layer_norm(model[0](x), [8], model[1].weight, model[1].bias)
    assert not torch.allclose(model(x), model[2](over_all), rtol=1e-2)


def test_gradients_of_masked_norms_are_zero_and_others_those_of_the_removed():
    model, inputs = Stream(nn.LayerNorm), tokens()
    spread(model)
    pruner = tk.Pruner(model, tokens(1), "random", filters=0.7, every=1, per_step=20)
    model(inputs).square().sum().backward()
    pruner.step()
    model.zero_grad()
    model(inputs).square().sum().backward()
    gradients = [norm.weight.grad.clone() for norm in model.norms]
    kept = [norm.weight != 0 for norm in model.norms]
    assert not any(gradient[~left].any() for gradient, left in zip(gradients, kept, strict=True))
    pruner.compact()
    model.zero_grad()
    model(inputs).square().sum().backward()
    for norm, gradient, left in zip(model.norms, gradients, kept, strict=True):
        torch.testing.assert_close(norm.weight.grad, gradient[left], rtol=1e-4, atol=1e-5)


def pruned_in_part(seed: int = 0) -> tuple[Stream, tk.Pruner]:
    torch.manual_seed(seed)
    model = Stream(nn.RMSNorm)
    spread(model)
    pruner = tk.Pruner(model, tokens(1), "random", filters=0.5, every=1, per_step=8)
    model(tokens()).square().sum().backward()
    pruner.step()
    return model, pruner


def test_masks_are_resumed_with_what_norms_are_run_on():
    model, pruner = pruned_in_part()
    state, saved = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    inputs = tokens()
    expected = model(inputs)
    again = Stream(nn.RMSNorm)
    again.load_state_dict(saved)
    other = tk.Pruner(again, tokens(1), "random", filters=0.5, every=1, per_step=8)
    other.load_state_dict(state)
    torch.testing.assert_close(again(inputs), expected)


def test_a_copy_computes_the_same_and_takes_no_second_pruner():
    model, pruner = pruned_in_part()
    twin, inputs = copy.deepcopy(model), tokens()
    torch.testing.assert_close(twin(inputs), model(inputs))
    with pytest.raises(ValueError, match=r"model: its norm 'norms\.0' is run on the channels"):
        tk.Pruner(twin, tokens(1), filters=0.5)
    pruner.compact()
    torch.testing.assert_close(twin(inputs), model(inputs))
    pruner.close()
    tk.Pruner(model, tokens(1), filters=0.9)


class Unlike(nn.Module):
    """Mixes its channels in a way that has no meaning for some of them."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.gain, self.mix = nn.Parameter(torch.rand(8) + 0.5), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.mix(x)


UNLIKE = {
    "softmax": lambda x: x.softmax(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1)[0],
    "largest beside a softmax": lambda x: x.softmax(-1) / x.abs().amax(-1, keepdim=True),
    "matmul": lambda x: x.sigmoid() @ x.sigmoid().mT @ x,
    "half of them": lambda x: x - x[:, :4].mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_no_norm_stays(name):
    model = nn.Sequential(nn.Linear(4, 8), Unlike(UNLIKE[name]), nn.Linear(8, 8), nn.Linear(8, 2))
    pruner = tk.Pruner(model, torch.randn(3, 4), filters=0.9)
    assert list(pruner.widths) == ["2"]
    assert "0" in pruner.skipped


def test_what_norms_compute_outlives_close():
    model, pruner = pruned_in_part()
    inputs = tokens()
    masked = model(inputs)
    pruner.close()
    torch.testing.assert_close(model(inputs), masked)
    with pytest.raises(ValueError, match="is run on the channels that an earlier Pruner has kept"):
        tk.Pruner(model, tokens(1), filters=0.5)
    pruner.compact()
    torch.testing.assert_close(model(inputs), masked)
    tk.Pruner(model, tokens(1), filters=0.9)


def test_passes_of_several_threads_leave_a_masked_norm_as_it_is():
    model, _ = pruned_in_part()
    inputs = [tokens() for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                for got, one in zip(pool.map(model, inputs), expected, strict=True):
                    torch.testing.assert_close(got, one)
    assert all(norm.weight.numel() == 12 for norm in model.norms)


def test_a_norm_keeps_two_channels():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    pruner = tk.Pruner(model, torch.randn(1, 4), "magnitude_l2", filters=0.25, every=1)
    while not pruner.done:
        pruner.step()
    assert pruner.widths == {"0": 2}
    with pytest.raises(ValueError, match=r"filters: 0\.2 cannot be reached"):
        tk.Pruner(
            nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
            torch.randn(1, 4), filters=0.2,
        )  # fmt: skip


class Mixer(nn.Module):
    """An MLP-Mixer's layer: positions are mixed as channels are, and have labels as they do."""

    def __init__(self, norm, length: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.tokens = nn.Sequential(nn.Linear(length, 24), nn.GELU(), nn.Linear(24, length))
        self.channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norms[0](x).mT).mT
        x = x + self.channels(self.norms[1](x))
        return self.out(self.norms[2](x).mean(1))


@pytest.mark.parametrize("length", [15, 16, 17])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, Own])
def test_a_stream_as_long_as_it_is_wide_is_like_any_other(norm, length):
    model, x = Mixer(norm, length).double(), torch.randn(4, length, 5, dtype=torch.float64)
    kept = ["tokens.0", "channels.0"]  # so that the stream has to shrink
    pruner = tk.Pruner(model, x[:1], "taylor_fo", filters=0.6, every=1, per_step=6, ignore=kept)
    while not pruner.done:
        model.zero_grad()
        model(x).square().sum().backward()
        pruner.step()
    assert pruner.widths["embed"] < 16
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=1e-10, atol=1e-10)
