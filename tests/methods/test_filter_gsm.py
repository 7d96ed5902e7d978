"""GSM over filters: which get their gradient, what decays, and that cut filters change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.methods import FilterGSM


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 3),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 3, (48,))
    images = 0.3 * torch.randn(48, 1, 6, 6)
    return images + labels.view(-1, 1, 1, 1), labels


def backward(model: nn.Module, images, labels) -> None:
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def test_a_step_is_that_of_float64():
    """Filters of both layers ranked together; norm and bias are active or passive with theirs."""
    model, (images, labels) = network(), batch()
    optimizer = FilterGSM(model, images, lr=0.1, momentum=0.9, weight_decay=0.01, compression=3)
    backward(model, images, labels)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    grads = {name: p.grad.double() for name, p in model.named_parameters()}
    parts = (("0.weight", "0.bias", "1.weight", "1.bias"), ("3.weight", "3.bias"))
    products = [
        sum((grads[n] * before[n]).flatten(1).sum(1) if grads[n].dim() > 1 else grads[n] * before[n]
            for n in names)
        for names in parts
    ]  # fmt: skip
    scores = torch.cat(products).abs()
    assert optimizer.active == 14 // 3
    active = torch.zeros(14, dtype=torch.bool)
    active[scores.topk(4).indices] = True
    optimizer.step()
    rows = dict.fromkeys(parts[0], active[:6]) | dict.fromkeys(parts[1], active[6:])
    for name, p in model.named_parameters():
        grad, decay = grads[name], 0.0 if name == "7.bias" else 0.01
        if name in rows:
            grad = grad * rows[name].view(-1, *[1] * (grad.dim() - 1))
        expected = before[name] - 0.1 * (0.01 * before[name] * (decay > 0) + grad)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_what_is_cut_at_the_end_changes_no_output():
    model, (images, labels) = network(), batch()
    optimizer = FilterGSM(model, images, lr=0.05, momentum=0.9, weight_decay=0.05, compression=3.5)
    for _ in range(400):
        backward(model, images, labels)
        optimizer.step()
    outputs = model.eval()(images)
    masked = copy.deepcopy(model)
    compact = optimizer.compact()
    left = compact[0].out_channels + compact[3].out_channels
    assert 4 <= left <= 5  # Q = 4, and one of each layer at least
    assert compact[1].num_features == compact[0].out_channels == compact[3].in_channels
    torch.testing.assert_close(compact(images), outputs, rtol=1e-2, atol=1e-2)
    assert (compact(images).argmax(1) == labels).float().mean() > 0.8
    assert masked[0].out_channels == 6


def test_a_saved_state_goes_on_to_the_same_bits():
    model, (images, labels) = network(), batch()
    optimizer = FilterGSM(model, images, lr=0.05, compression=2)
    backward(model, images, labels)
    optimizer.step()
    again = copy.deepcopy(model)
    other = FilterGSM(again, images, lr=0.01, compression=2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    backward(model, images, labels)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        theirs.grad = mine.grad.clone()
    optimizer.step()
    other.step()
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_mistakes_are_named_and_change_nothing():
    model, (images, labels) = network(), batch()
    with pytest.raises(ValueError, match=r"compression: 0\.5"):
        FilterGSM(model, images, compression=0.5)
    with pytest.raises(ValueError, match="no filters of it can go"):
        FilterGSM(nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4))
    up = nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(ValueError, match="'0' is a transposed convolution"):
        FilterGSM(up, images)
    optimizer = FilterGSM(model, images, lr=0.1)
    backward(model, images, labels)
    model[3].weight.grad[2, 0, 0, 0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="3: the sum over one of its filters"):
        optimizer.step()
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))


def test_filters_that_a_norm_reads_together_stay():
    """A LayerNorm's statistics would change once their zeros are gone."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2))
    optimizer = FilterGSM(model, torch.randn(1, 4), compression=2)
    assert optimizer.active == 3  # of the six that the second layer has
