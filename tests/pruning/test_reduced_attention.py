"""Attention over a smaller image: its scale, its width by other tensors, and single keys."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk
from taylor_kernels.pruning.proof.alone import HIDING
from taylor_kernels.pruning.proof.exact_run import InDouble, SmallPools
from tests.zoo.judging import distance, in_double


class Attention(nn.Module):
    """Of heads whose width scales their scores; keys and values are of a smaller image.

    Args:
        scaled: what takes the softmax.
        own: the output has a width that its attributes say, not the input's.
    """

    def __init__(self, width: int, heads: int, step: int, scaled: str, own: bool) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.scaled, self.own = width, heads, scaled, own
        self.head_size, self.reduction_ratio = width // heads, step
        self.all_head_size = heads * self.head_size
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.reduce, self.norm = nn.Conv2d(width, width, step, step), nn.LayerNorm(width)

    def cut(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.head_size).transpose(1, 2)

    def forward(self, x: Tensor, height: int) -> Tensor:
        batch, length, width = x.shape
        image = x.transpose(1, 2).reshape(batch, width, height, -1)
        small = x
        if self.reduction_ratio > 1:
            small = self.norm(self.reduce(image).reshape(batch, width, -1).transpose(1, 2))
        query, key, value = self.cut(self.query(x)), self.cut(self.key(small)), self.value(small)
        value = self.cut(value)
        if self.scaled == "by a function":
            y = F.scaled_dot_product_attention(query, key, value, scale=self.head_size**-0.5)
        else:
            scores = query @ key.transpose(-1, -2) / self.head_size**0.5
            scores = scores.softmax(-1) if self.scaled == "by a method" else F.softmax(scores, -1)
            y = scores @ value
        y = y.transpose(1, 2).reshape(batch, length, self.all_head_size if self.own else width)
        return self.project(y)


class Block(nn.Module):
    def __init__(self, width: int, **options: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, **options)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        # Arguments with their names: what the module hands on it has at hand, too.
        x = x + self.attention(x=self.norm(x), height=image.shape[2])
        return self.leave((x + self.down(F.gelu(self.up(x)))).mean(1))


def pruned(model: nn.Module, x: Tensor) -> tuple[tk.Pruner, float]:
    """A pruner at its target, and how far what is removed is from what was masked."""
    pruner = tk.Pruner(model, x, "magnitude_l2", params=0.7, every=1, per_step=0.2)
    while not pruner.done:
        pruner.step()
    fresh = torch.randn(2, *x.shape[1:])
    model(fresh)
    masked = in_double(model, fresh)
    return pruner, distance(masked, in_double(pruner.compact(), fresh))


@pytest.mark.filterwarnings("ignore:compact")
@pytest.mark.parametrize("scaled", ["by a function", "by a method", "by softmax"])
def test_a_single_key_of_a_cut_down_image_does_not_hide_how_scores_are_scaled(scaled):
    """Of 32 pixels a side 16 are left, and of 4 keys one."""
    torch.manual_seed(1)
    model = Block(width=10, heads=1, step=16, scaled=scaled, own=True)
    pruner, error = pruned(model, torch.randn(1, 3, 32, 32))
    assert error < 1e-12
    one_head = [f"attention.{name}" for name in ("query", "key", "value")]
    assert sorted(pruner.skipped) == sorted(["leave", *one_head])


@pytest.mark.filterwarnings("ignore:compact")
@pytest.mark.parametrize(
    ("heads", "own", "left"),
    [
        (1, True, ["attention.key", "attention.query", "attention.value"]),
        (2, True, []),  # as many as the image is reduced by
        (3, True, []),
        (3, False, []),
    ],
)
def test_what_is_as_wide_as_the_stream_follows_it_beside_what_cannot(heads, own, left):
    torch.manual_seed(2)
    model = Block(width=12, heads=heads, step=2, scaled="by a method", own=own)
    pruner, error = pruned(model, torch.randn(1, 3, 8, 8))
    assert error < 1e-12
    assert sorted(pruner.skipped) == sorted(["leave", *left])


#: Functions that normalise, on so many numbers at once.
CALLS = {
    "softmax": lambda n: torch.softmax(torch.randn(2, n), 1),
    "softmax by name": lambda n: F.softmax(input=torch.randn(n, 3), dim=0),
    "method": lambda n: torch.randn(3, n).log_softmax(dim=-1),
    "module": lambda n: nn.Softmax(2)(torch.randn(2, 3, n)),
    "log_softmax": lambda n: F.log_softmax(torch.randn(2, n, 3), dim=1),
    "attention": lambda n: F.scaled_dot_product_attention(
        torch.randn(2, 4, 3), torch.randn(2, n, 3), torch.randn(2, n, 3)
    ),
    "attention by names": lambda n: F.scaled_dot_product_attention(
        query=torch.randn(2, 4, 3), key=torch.randn(2, n, 3), value=torch.randn(2, n, 3)
    ),
    "module of heads": lambda n: nn.MultiheadAttention(4, 2)(
        torch.randn(3, 2, 4), torch.randn(n, 2, 4), torch.randn(n, 2, 4)
    ),
    "normalize": lambda n: F.normalize(torch.randn(2, n, 3)),
    "normalize along": lambda n: F.normalize(torch.randn(2, 3, n), dim=-1),
    "group_norm": lambda n: nn.GroupNorm(3, 3)(torch.randn(2, 3, n)),
    "instance_norm": lambda n: nn.InstanceNorm2d(3).eval()(torch.randn(2, 3, n, 2)[..., :1]),
}


@pytest.mark.parametrize("mode", [SmallPools, InDouble])
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_a_function_of_single_numbers_is_noticed(make, mode):
    with mode() as many:
        make(2)
    assert not many.alone
    # PyTorch itself refuses to normalise single numbers, sometimes.
    with mode() as one, suppress(ValueError):
        make(1)
    assert one.alone


def test_every_such_function_is_tried():
    seen = set()

    class Seen(SmallPools):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return super().__torch_function__(func, types, args, kwargs)

    with Seen():
        for make in CALLS.values():
            make(2)
    missing = {func for func in HIDING - seen if func.__name__ not in ("softmax", "log_softmax")}
    assert not missing
