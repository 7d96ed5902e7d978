"""Numbers of channels that code reads from an object of settings, which all layers share."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_kernels.pruning import Pruner
from taylor_kernels.tracing.model.settings import get_attribute, set_attribute
from tests.tracing.parts import Apply
from tests.zoo.judging import check_all_but, check_file, distance, in_double


@dataclass(frozen=True)
class Frozen:
    """A config that cannot be written to."""

    stream: int
    heads: int
    head_dim: int


class Attention(nn.Module):
    """Reads its sizes from the settings at every call; how it is given them says `kind`."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        stream, heads, head_dim = self.sizes()
        self.query, self.key, self.value = (nn.Linear(stream, heads * head_dim) for _ in range(3))
        self.leave = nn.Linear(heads * head_dim, stream)
        # A target takes what contributes least, and that may be the stream alone: the last head,
        # and the last place of every head, contribute next to nothing, so that they go first.
        with torch.no_grad():
            for layer in (self.query, self.key, self.value):
                parts = layer.weight.view(heads, head_dim, stream)
                parts[-1] *= 1e-2
                parts[:, -1] *= 1e-2

    def sizes(self) -> tuple[int, int, int]:
        s = self.settings
        if isinstance(s, dict):
            return s["stream"], s["heads"], s["head_dim"]
        return s.stream, s.heads, s.head_dim

    def forward(self, x: Tensor) -> Tensor:
        _, heads, head_dim = self.sizes()
        shape = (*x.shape[:2], heads, head_dim)
        parts = [f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value)]
        found = F.scaled_dot_product_attention(*parts).transpose(1, 2)
        return x + self.leave(found.reshape(*x.shape[:2], heads * head_dim))


KINDS: dict[str, Callable[..., Any]] = {
    "namespace": SimpleNamespace, "frozen": Frozen, "dictionary": dict,
}  # fmt: skip


def model_of(kind: str, rng: random.Random) -> tuple[nn.Module, Tensor]:
    """Two such layers of shared settings, in a stream."""
    heads, head_dim = rng.choice([3, 4, 6]), rng.choice([2, 5, 8])
    stream = rng.choice([n for n in range(7, 30) if n not in (heads, head_dim, heads * head_dim)])
    settings = KINDS[kind](stream=stream, heads=heads, head_dim=head_dim)
    body = [Attention(settings) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, stream), *body, nn.Linear(stream, 3)), torch.randn(1, 7, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_what_a_layer_reads_from_shared_settings_follows(kind, seed):
    model, inputs = model_of(kind, random.Random(seed))
    shared = model[1].settings
    before, sizes = copy.deepcopy(shared), model[1].sizes()
    check_all_but(["3"], model, inputs)
    assert shared == before, "the settings of others are as they were"
    for layer in model[1:3]:
        _, heads, head_dim = layer.sizes()
        assert heads * head_dim == layer.query.out_features
    assert any(layer.sizes() != sizes for layer in model[1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_file_keeps_them(kind, tmp_path):
    pytest.importorskip("safetensors", reason="pruned models are files of safetensors")
    check_file(*model_of(kind, random.Random(7)), tmp_path / "model.safetensors")


class Tail(nn.Module):
    """Puts tokens side by side again, as wide as its settings or a list of its own say."""

    def __init__(self, widths: list[int], own: bool) -> None:
        super().__init__()
        if own:
            self.widths = widths
        else:
            self.config = SimpleNamespace(widths=widths)
        self.enter, self.leave = nn.Linear(5, widths[-1]), nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        widths = self.widths if hasattr(self, "widths") else self.config.widths
        return self.leave(self.enter(x).relu().reshape(len(x), -1, widths[-1]))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_a_width_of_a_list_that_a_reshape_repeats_follows(own, seed):
    widths = random.Random(seed).sample(range(6, 20), 3)
    model = Tail(list(widths), own)
    check_all_but(["leave"], model, torch.randn(1, 4, 5))
    held = model.widths if own else model.config.widths
    assert held[:2] == widths[:2]
    assert held[2] == model.enter.out_features < widths[2]


def test_setting_a_number_leaves_others_alone():
    one, other = (nn.Identity() for _ in range(2))
    one.config = other.config = SimpleNamespace(heads=4)
    set_attribute(one, "config.heads", 3)
    assert (one.config.heads, other.config.heads) == (3, 4)
    assert get_attribute(one, "config.heads") == 3
    assert get_attribute(one, "config.width") is get_attribute(one, "nothing.heads") is None


@pytest.mark.parametrize("packed", [False, True])
def test_heads_that_a_layer_of_einops_counts(packed):
    """It runs with what it made of the sizes that it was given at first."""
    einops = pytest.importorskip("einops.layers.torch", reason="its layers are what is cut here")
    if packed:
        cut = einops.Rearrange("n t (three h d) -> three n h t d", three=3, h=4)
        make = [nn.Linear(10, 60)]
    else:
        cut, make = (
            einops.Rearrange("n t (h d) -> n h t d", h=4),
            [nn.Linear(10, 20) for _ in range(3)],
        )

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        cut = [self.cut(layer(x)) for layer in self.make]
        y = F.scaled_dot_product_attention(*(cut[0] if packed else cut))
        return self.leave(self.join(y))

    model = Apply(
        forward, enter=nn.Linear(5, 10), make=nn.ModuleList(make), cut=cut,
        join=einops.Rearrange("n h t d -> n t (h d)"), leave=nn.Linear(20, 3),
    )  # fmt: skip
    inputs = torch.randn(2, 6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    options = {"filters": 0.6, "every": 1, "ignore": ["enter"], "optimizer": optimizer}
    pruner = Pruner(model, inputs, "magnitude_l2", **options)
    assert set(pruner.skipped) == {"enter", "leave"}
    while not pruner.done:
        pruner.step()
    masked = in_double(model, inputs)
    pruner.compact()
    assert distance(masked, in_double(model, inputs)) < 1e-12
    assert model.cut.axes_lengths["h"] == 2
    assert model.make[0].out_features == 5 * (6 if packed else 2)
