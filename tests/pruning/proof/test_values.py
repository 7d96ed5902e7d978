"""A proof masks large tensors in place and gives them up; what a further trial needs comes back."""

from __future__ import annotations

import copy
import random
import time

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner, prunable
from taylor_kernels.pruning.copies import copied
from taylor_kernels.pruning.proof import values
from taylor_kernels.pruning.proof.noise import Noise
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.pruning.proof.values import Values
from tests.tracing.pieces import Apply


def parted(_: nn.Module, x: Tensor) -> Tensor:
    """Code that a proof has to refuse: the first three channels go another way."""
    out = x.sigmoid()
    out[:, :3] = x[:, :3].relu()
    return out


def network(sound: list[bool]) -> nn.Module:
    """Convolutions of random widths, each of which can go or cannot. All of their channels reach
    the output, whichever are masked: behind ReLUs a few of them are dead now and then."""
    wide, layers = 3, []
    for each in sound:
        width = random.randint(8, 15)
        layers += [nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.3)]
        layers += [] if each else [Apply(parted)]
        wide = width
    return nn.Sequential(*layers, nn.Conv2d(wide, 2, 1))


@pytest.fixture
def every_tensor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_LARGE", 0)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("every_tensor_is_large")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("narrow", [False, True])
def test_values_made_anew_are_the_same_bits(dtype: torch.dtype, narrow: bool):
    model = network([True, True]).to(dtype).to(memory_format=torch.channels_last)
    model.register_parameter("row", nn.Parameter(torch.randn(5, dtype=dtype).expand(4, 5)))
    before, other = tensors_of(model), copied(model)
    made = Values(dict(other.named_modules()), model, Noise())
    if narrow:
        made.set_exact(False)
    first = tensors_of(other)
    assert {t.dtype for t in first.values() if t.is_floating_point()} == {
        dtype if narrow else torch.float64
    }
    for name in random.sample([*before], 5):
        masked = made.to_mask(name)
        assert masked.requires_grad is False
        masked.data.fill_(7)
        if random.random() < 0.5:
            made.give_up(name)
        assert other.state_dict()[name].shape == first[name].shape
    made.make_anew()
    again = tensors_of(other)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Parameters have noise on them, buffers do not.
    for name, tensor in model.named_buffers():
        assert torch.equal(again[name], tensor.to(again[name].dtype))
    for name, tensor in model.named_parameters():
        moved = (again[name] - tensor.to(again[name].dtype)).abs().double()
        assert moved.max() > 0
        assert moved.max() <= 0.6 / max(tensor[0].numel() if tensor.dim() > 1 else 10, 1) ** 0.5


@pytest.mark.usefixtures("every_tensor_is_large")
def test_memory_is_given_back_while_channels_are_removed(monkeypatch: pytest.MonkeyPatch):
    trials: list[Trial] = []
    monkeypatch.setattr(prunable, "Trial", lambda *args: trials.append(Trial(*args)) or trials[-1])
    pruner = Pruner(network([True] * 3), torch.randn(1, 3, 4, 4), "magnitude_l2", filters=0.9)
    (trial,) = trials
    assert len(pruner.widths) == 3
    entries = {e.tensor for group in trial.channels.groups for e in group.entries}
    assert {"0.weight", "0.bias", "1.running_var", "3.weight"} < entries
    for name in entries:
        assert trial._run.tensors[name].untyped_storage().nbytes() == 8, name
    # Trials after it have all values again.
    for numbers in ([1], range(3), [0, 2]):
        assert trial.fault(numbers, time.monotonic() + 60) == ""


@pytest.mark.parametrize("large", [0, 2**30])
def test_faults_are_found_among_large_and_small_tensors(large: int, monkeypatch):
    monkeypatch.setattr(values, "_LARGE", large)
    for _ in range(4):
        sound = [random.random() < 0.5 for _ in range(4)] + [True]
        model = network(sound)
        before = copy.deepcopy(model)
        pruner = Pruner(model, torch.randn(1, 3, 4, 4), "magnitude_l2", filters=0.9)
        convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert list(pruner.widths) == [
            name for name, each in zip(convolutions, sound, strict=False) if each
        ]
        after = model.state_dict()
        assert all(torch.equal(tensor, after[n]) for n, tensor in before.state_dict().items())
