"""What a trace answers: names, attributes, outputs, masks, table and picture."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels import tracing
from taylor_kernels.tracing import Channels, register_attributes, trace
from tests.helpers.docstrings import run_examples

IMAGE = torch.randn(2, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


class Residual(nn.Module):
    """Every body is added to what it is given."""

    def __init__(self, bodies: nn.Sequential) -> None:
        super().__init__()
        self.bodies, self.out = bodies, nn.Conv2d(3, 2, 1)
        self.enter = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for body in self.bodies:
            x = x + body(x)
        return self.out(x)


def test_copies_and_tied_weights_go_by_the_first_name():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 6), nn.Linear(6, 2)
    )
    model[2].weight = model[0].weight
    channels = trace(copy.deepcopy(model), torch.randn(2, 4))
    assert "2.weight" not in channels.classes
    group = channels.groups[0]
    assert {(e.tensor, e.dim) for e in group.entries} >= {("0.weight", 0), ("3.weight", 1)}
    dead = [torch.zeros(g.size, dtype=torch.bool) for g in channels.groups]
    dead[0][0] = True
    assert channels.attributes(dead)["2"] == {"out_features": 5}


def test_registered_attributes_follow():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape, self.gain = (1, 6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    register_attributes(Scale, shape=("gain", 0))
    channels = trace(nn.Sequential(nn.Linear(4, 6), Scale(), nn.Linear(6, 2)), torch.randn(2, 4))
    dead = [torch.tensor([True, True, False, False, False, False])]
    assert channels.attributes(dead)["1"] == {"shape": (1, 4)}
    with pytest.raises(TypeError, match="shape: expected"):
        register_attributes(Scale, shape=3)
    with pytest.raises(TypeError, match="module_class"):
        register_attributes(int, shape=("gain", 0))


def test_the_outputs_of_a_layer_lie_along_what_it_names():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv1d(3, 5, 1), nn.ConvTranspose1d(5, 6, 1)
            self.own = nn.Parameter(torch.randn(6, 7))
            self.out = nn.Linear(7, 2)

        def forward(self, x):
            return self.out(self.up(self.down(x)).mean(-1) @ self.own)

    channels = trace(Model(), torch.randn(2, 3, 4))
    axes = {"down.weight": 0, "up.weight": 1, "own": 1, "out.weight": 0}
    found = [channels.weights_of(layer) for layer in channels.layers]
    assert [one for (one,) in found] == list(axes.items())
    for (_, outputs), ((name, dim),) in zip(channels.layers.values(), found, strict=True):
        assert torch.equal(channels.classes[name][dim], outputs)
    lone = trace(nn.Linear(3, 2), torch.randn(1, 3))
    assert lone.weights_of("") == (("weight", 0),)


def test_wrong_masks_are_refused():
    channels = trace(net(), IMAGE)
    for dead in ([], [torch.zeros(7, dtype=torch.bool)], [torch.zeros(8)]):
        with pytest.raises(ValueError, match="dead: "):
            channels.entries(dead)


@pytest.mark.parametrize(
    "module",
    [tracing.tracing, tracing.answer.channels, tracing.notes.attributes],
    ids=lambda module: module.__name__,
)
def test_examples_of_the_documentation(module):
    run_examples(module, module.__name__, own=True)


def test_lines_of_the_table_fit_a_terminal():
    model = nn.Sequential()
    for number in range(9):
        model.append(nn.Sequential())
        model[-1].add_module(f"convolution_number_{number}", nn.Conv2d(3, 3, 1))
    text = trace(Residual(model), IMAGE).table()
    assert text.count("\n") > 2
    assert max(map(len, text.splitlines())) <= 100


def test_it_prints_and_draws(tmp_path):
    channels = trace(net(), IMAGE)
    assert isinstance(channels, Channels)
    assert re.search(r"^0 +8 units .* 0\.out, 3\.in$", str(channels), re.MULTILINE)
    assert "1 groups, 8 units, 1 skipped" in repr(channels)
    page = channels.show(tmp_path / "channels.html").read_text()
    assert "<svg" in page
    assert "reaches the output" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


class Detached(nn.Module):
    """A parametrization whose result a trace cannot follow."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(weight.detach().numpy().copy())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("place", [0, 2])
def test_a_layer_whose_weight_cannot_be_followed_says_so(place, bias):
    model = nn.Sequential(
        nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 6, bias=bias), nn.ReLU(),
        nn.Linear(6, 2),
    )  # fmt: skip
    nn.utils.parametrize.register_parametrization(model[place], "weight", Detached())
    skipped = trace(model, torch.randn(2, 4)).skipped
    assert "not reached" not in skipped[str(place)]
    if not bias:
        assert "cannot be followed" in skipped[str(place)]
