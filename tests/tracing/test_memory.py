"""Labels keep no activation alive: tracing needs about the memory of a forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from taylor_kernels.tracing import trace
from taylor_kernels.tracing.notes import record
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

{network}
trace(model, small)  # what is loaded at the first use counts for neither

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before, large = peak(), torch.randn(1, 3, size, size)
with torch.no_grad():
    model(large)
forward = peak() - before
model.register_forward_hook(lambda *_: None)  # so that the trace computes what the model does
trace(model, large)
print(forward, peak() - before)  # a peak is the greatest so far
"""


# For each network its code, the size of the images, and the floats of two of its activations.
_NETWORKS = {
    "1x1 convolutions in a row": (
        """
layers = [nn.Conv2d(3, 16, 1)]
for _ in range(6):
    layers += [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
model, small, size = nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8), 512
""",
        2 * 16 * 512 * 512,
    ),
    "residual blocks": (
        """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
    def forward(self, x):
        return x + self.two(self.norm(self.one(x)).relu())
model = nn.Sequential(nn.Conv2d(3, 16, 1), *(Block() for _ in range(6))).eval()
small, size = torch.randn(1, 3, 8, 8), 512
""",
        2 * 16 * 512 * 512,
    ),
    "concatenations": (
        """
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 1) for i in range(8))
        self.enter = nn.Conv2d(3, 8, 1)
    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x.relu())], 1)
        return x
model, small, size = Dense().eval(), torch.randn(1, 3, 8, 8), 512
""",
        2 * 36 * 512 * 512,
    ),
    "attention": (
        """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT * 0.3).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, t, c))
class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.body = nn.Conv2d(3, 32, 8, 8), nn.Sequential(*(Attention() for _ in "abc"))
    def forward(self, x):
        return self.body(self.enter(x).flatten(2).mT)
model, small, size = Patches().eval(), torch.randn(1, 3, 16, 16), 256
""",
        2 * 4 * 1024 * 1024,
    ),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.sample(2, covering=False)
@pytest.mark.parametrize("name", _NETWORKS)
def test_tracing_needs_at_most_twice_the_memory_of_a_forward_pass(name):
    network, floats = _NETWORKS[name]
    done = run_program(_PEAK.replace("{network}", network))
    assert done.returncode == 0, done.stderr
    forward, traced = map(int, done.stdout.split())
    assert forward > floats * 4 / 1024
    assert traced <= 2 * forward


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
