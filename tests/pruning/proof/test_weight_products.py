"""A proof hears products that code makes with weights by itself, whatever comes behind them."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk
from taylor_kernels.pruning.proof.weight_products import WeightProducts

#: Products of rows [n, width] with a weight [outputs, width].
PRODUCTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "matmul": lambda s, h: h @ s.weight.T + s.bias,
    "the weight first": lambda s, h: (s.weight @ h.T).T + s.bias,
    "row by row": lambda s, h: torch.stack([s.weight.mv(row) + s.bias for row in h]),
    "F.linear": lambda s, h: F.linear(h, s.weight, s.bias),
    "addmm": lambda s, h: torch.addmm(s.bias, h, s.weight.t()),
    "einsum": lambda s, h: torch.einsum("ni,oi->no", h, s.weight) + s.bias,
    "a convolution": lambda s, h: F.conv1d(h[..., None], s.weight[..., None], s.bias)[..., 0],
    "a scaled weight": lambda s, h: F.linear(h, s.weight * 0.5, s.bias),
    "rows of it": lambda s, h: torch.cat([h @ part.T for part in s.weight.chunk(2)], 1),
    "a copy": lambda s, h: h @ s.weight.T.contiguous(),
    "vmap": lambda s, h: torch.vmap(lambda row: F.linear(row, s.weight, s.bias))(h),
    "a layer's weight": lambda s, h: F.linear(h, s.layer.weight),
}


class Behind(nn.Module):
    """Something that may be wrong, a product, and code that hides what has come of it."""

    def __init__(self, width: int, middle: Callable, product: Callable | nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.product = nn.Linear(5, width), middle, product
        self.weight, self.bias = nn.Parameter(torch.randn(6, width)), nn.Parameter(torch.randn(6))
        self.layer = nn.Linear(width, 6)
        self.out = nn.Parameter(torch.randn(width if isinstance(product, nn.Module) else 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.first(x))
        y = self.product(h) if isinstance(self.product, nn.Module) else self.product(self, h)
        return (y - 1e7).relu() @ self.out


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.mix(h[None], h[None], h[None])[0][0]


#: What a trace does not see: it follows the width.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "how many": lambda h: h * (1 + h.size(1)),
    "places": lambda h: h * torch.tensor([1.0 + i for i in range(h.size(1))]).to(h),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*PRODUCTS, "MultiheadAttention"])
def test_a_product_shows_what_is_wrong_in_front_of_it(name, wrong):
    torch.manual_seed(random.randrange(2**31))
    width = 2 * random.randint(4, 7)
    for middle, sound in ((WRONG[wrong], False), (torch.tanh, True)):
        product = PRODUCTS[name] if name in PRODUCTS else Attention(width)
        model = Behind(width, middle, product)
        try:
            offered = set(tk.Pruner(model, torch.randn(4, 5), "magnitude_l2", filters=0.8).widths)
        except ValueError as error:
            assert "has nothing to prune" in str(error)  # noqa: PT017 - attention has no other group
            offered = set()
        assert ("first" in offered) == sound


def test_copies_of_weights_are_given_up_as_code_does():
    """A proof's run takes no more memory than the model's own, and heard copies are told from what
    comes into their memory."""
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def steps(self: nn.Module, h: Tensor) -> Tensor:
        for scale in (0.5, 0.25, 2.0, 3.0):
            scaled = self.weight * scale
            copies.append(weakref.ref(scaled))
            y = h @ scaled.T
            alive.append(sum(ref() is not None for ref in copies))
            del scaled
        return y

    tk.Pruner(Behind(8, torch.tanh, steps), torch.randn(4, 5), "magnitude_l2", filters=0.8)
    assert len(alive) > 4
    assert set(alive) == {1}

    heard: list[str] = []
    weight, x = torch.randn(300, 300), torch.randn(2, 300)
    with WeightProducts({"weight": weight}, lambda name, *_: heard.append(name)):
        for count in range(1, 6):
            x @ (weight * 0.5)
            assert len(heard) == count
            for _ in range(3):
                x @ torch.ones(300, 300).mul_(2)
            assert len(heard) == count
