"""Training for integers: channels lose their step, and what is left is what it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional as F

from taylor_kernels.pruning import Pruner
from taylor_kernels.tracing import trace
from tests.tracing.removal import faults


class Rounded(nn.Module):
    """The weight of a layer, and channels, each with a step of its own."""

    def __init__(self, width: int, learnt: bool) -> None:
        super().__init__()
        self.enter, self.inner = nn.Linear(5, width), nn.Linear(width, width)
        self.leave, self.learnt = nn.Linear(width, 2), learnt
        steps = torch.rand(width) / 20 + 0.02
        if learnt:
            self.steps, self.zeros = nn.Parameter(steps), nn.Parameter(torch.zeros(width))
        else:
            self.register_buffer("steps", steps)
            self.register_buffer("zeros", torch.randint(-2, 3, (width,), dtype=torch.int32))

    def rounded(self, x: Tensor, axis: int) -> Tensor:
        steps = self.steps.float()
        if self.learnt:
            zeros = self.zeros.float()
            return torch._fake_quantize_learnable_per_channel_affine(
                x.float(), steps, zeros, axis, -8, 7, 1.0
            ).to(x)
        return torch.fake_quantize_per_channel_affine(x.float(), steps, self.zeros, axis, -8, 7).to(
            x
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.enter(x), self.rounded(self.inner.weight, 0))
        return self.leave(self.rounded(x, 1))


@pytest.mark.parametrize("learnt", [False, True], ids=["given", "learnt"])
def test_each_channel_has_a_step_of_its_own(learnt):
    model, x = Rounded(7, learnt), torch.randn(6, 5)
    channels = trace(model, x)
    assert channels.skipped == {"leave": "reaches the output of the model"}
    assert channels.fills["steps"] == {0: 1.0}
    assert not faults(model, x, channels)


def prepared(*layers: nn.Module, folded: Sequence[list[str]] = ()) -> nn.Module:
    """A network of layers as PyTorch makes it ready to train for integers."""
    model = nn.Sequential(quantization.QuantStub(), *layers).train()
    if folded:
        model = quantization.fuse_modules_qat(model, folded)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(model)


def test_ranges_are_taken_until_the_observers_are_disabled():
    model = prepared(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 6), nn.Linear(6, 2)
    )
    x = torch.randn(4, 3, 5, 5)
    model(x)
    kept = trace(model, x)
    assert not kept.groups
    assert "until that is disabled" in kept.skipped["1"]
    model.apply(quantization.disable_observer)
    channels = trace(model, x)
    assert [group.size for group in channels.groups] == [8, 6]
    assert list(channels.skipped) == ["5"]


def test_a_norm_that_is_folded_into_a_rounded_convolution():
    """What comes of it is divided by the norm's scale again, which may be no zero then."""
    model = prepared(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7),
        nn.Flatten(), nn.Linear(7, 2), folded=[["1", "2", "3"], ["4", "5"]],
    )  # fmt: skip
    x = torch.randn(4, 3, 5, 5)
    model(x)
    model.apply(quantization.disable_observer)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = Pruner(model, x, "taylor_fo", filters=0.5, every=1, optimizer=optimizer)
    assert list(pruner.skipped) == ["7"]
    made: list[Tensor] = []
    for part in model.modules():
        part.register_forward_hook(lambda module, given, out: made.append(out))
    while not pruner.done:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        pruner.step()
        optimizer.step()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert all(tensor.isfinite().all() for tensor in made)
    before = model.eval()(x)
    torch.testing.assert_close(pruner.compact()(x), before)
