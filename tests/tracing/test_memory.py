"""Labels keep no activation alive: tracing needs about the memory of a forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from taylor_kernels.tracing import record, trace
from tests.helpers.programs import run_program

# The peak is the process's own, so each is measured in a process of its own.
_PEAK = """
import ctypes
import torch
from torch import nn
from taylor_kernels.tracing import trace

# What is freed goes back at once: else the heap's gaps count, which differ from run to run.
assert ctypes.CDLL(None).mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD
torch.set_num_threads(1)
layers = [nn.Conv2d(3, 16, 1)]
for _ in range(6):
    layers += [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
model, small = nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8)
trace(model, small)  # what is loaded at the first use counts for neither

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before, large = peak(), torch.randn(1, 3, 512, 512)
{run}
print(peak() - before)
"""


def peak_kib(run: str) -> int:
    done = run_program(_PEAK.format(run=run))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_tracing_needs_at_most_twice_the_memory_of_a_forward_pass():
    forward = peak_kib("with torch.no_grad(): model(large)")
    assert forward > 2 * 16 * 512 * 512 * 4 / 1024  # two activations at least
    assert peak_kib("trace(model, large)") <= 2 * forward


def test_the_size_of_labels_is_bounded(monkeypatch):
    """One error that says what to do, and the model is as it was."""
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)).train()
    trace(model, torch.randn(1, 4))
    monkeypatch.setattr(record, "MOST", 100)
    with pytest.raises(MemoryError, match=r"more than 100 labels; pass a smaller example"):
        trace(model, torch.randn(1, 4))
    assert all(module.training for module in model.modules())


class Scaled(nn.Module):
    """Layers, and tensors that code makes of numbers, out of sight of a trace, behind each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = (layer(x) * torch.tensor(1.5)).relu() * torch.tensor(0.5)
            x = x + torch.tensor([0.1] * 8)
        return x


@pytest.mark.parametrize("layers", [2, 9, 30])
def test_what_code_makes_in_memory_that_was_another_tensors_is_made_of_nothing(layers):
    channels = trace(Scaled(layers), torch.randn(2, 8), blocks=True)
    assert [set(step.sources) for step in channels.steps] == [
        set(),
        *({number} for number in range(layers)),
    ]
    assert channels._record.values is not None
    values = channels._record.values.values
    made_outside = [value for value in values if not value.operation]
    # The example, the parameters of each layer, and three numbers behind it.
    assert len(made_outside) == 1 + layers * (2 + 3)
    assert not any(value.operation == "view" for value in values)


#: Operations of two results, of which code drops one: what it keeps.
OF_TWO = {
    "var_mean, without the mean": lambda x: torch.var_mean(x, 1)[0],
    "var_mean, without the variance": lambda x: torch.var_mean(x, 1)[1],
    "max, without the places": lambda x: x.max(1).values,
    "topk, without the places": lambda x: x.topk(1, 1).values[:, 0],
    "aminmax, without the greatest": lambda x: x.aminmax(dim=1).min,
}


class Gated(nn.Module):
    """Layers, each scaled by a number of code and by one of two results of an operation."""

    def __init__(self, layers: int, kept) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            scale = self.kept(x)
            number = torch.tensor([0.5, 0.25])
            x = layer(x) * number[:, None] + scale[:, None]
        return x


@pytest.mark.parametrize("kept", OF_TWO.values(), ids=OF_TWO)
def test_memory_of_a_result_that_was_dropped_is_no_other_tensors(kept):
    layers = 12
    channels = trace(Gated(layers, kept), torch.randn(2, 8), blocks=True)
    assert channels._record.values is not None
    made_outside = [v for v in channels._record.values.values if not v.operation]
    # The example, the parameters of each layer, and one number for each.
    assert len(made_outside) == 1 + layers * 3
